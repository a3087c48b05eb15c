"""The worker: banner, Settings, and RunPod's SDK until it is told to stop.

Knows the SDK's configuration and what it leaves undone when it stops.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from serve_app.errors import Draining, error_body, job_error
from serve_app.settings import ConfigError, EntrySettings, Settings
from serve_app.worker import cluster, progress
from serve_app.worker.banner import banner
from serve_app.worker.boot import Boot
from serve_app.worker.handler import Handler
from serve_app.worker.job import new_request_id
from serve_app.worker.phases import process_age_s

log = logging.getLogger(__name__)


def make_handler(settings: Settings, config: str | Path, tell: progress.Tell) -> Handler:
    """The handler for the deployment that `config` describes; starts nothing yet."""
    settings = cluster.with_load_log(settings)
    process_s = process_age_s()  # the first job may come much later
    return Handler(
        Boot(lambda: cluster.start(settings, config, process_s)),
        tell=tell,
        load_log=settings.load_log or "",
        progress_interval_s=settings.runpod.progress_interval_s,
        max_body_bytes=settings.api.max_body_bytes,
    )


def num_slots(settings: Settings) -> int:
    """Jobs taken at once: a little more than the engine runs, so that it never waits for one."""
    engine = settings.engine
    return settings.runpod.concurrency or engine.max_running + engine.max_waiting // 4


def run(settings: Settings, entry: EntrySettings, checked: list[str]) -> int:
    """Takes jobs until SIGTERM; 0 when every job taken has been answered."""
    slots = num_slots(settings)
    for line in banner(settings, entry.serve_config, slots, checked):
        log.info("%s", line)
    handler = make_handler(settings, entry.serve_config, progress.post)
    try:
        take_jobs(handler, slots, settings.runpod.drain_s)
    finally:
        cluster.stop()
    log.info("All jobs are answered; the worker ends.")
    return 0


def take_jobs(handler: Handler, slots: int, drain_s: float) -> None:
    """Runs RunPod's SDK until SIGTERM, then answers what it left."""
    try:
        import runpod
    except ValueError as error:
        raise ConfigError(
            f"RUNPOD_LOG_LEVEL takes TRACE, DEBUG, INFO, WARN or ERROR ({error})."
        ) from None

    config: dict[str, Any] = {
        "handler": handler.handle,
        "return_aggregate_stream": True,
        # A constant: any change stops the taking of jobs until the worker is idle.
        "concurrency_modifier": lambda _: slots,
    }
    runpod.serverless.start(config)
    asyncio.run(_answer_leftovers(config, drain_s))


async def _answer_leftovers(config: dict[str, Any], limit_s: float) -> None:
    """Answers the jobs that the SDK's last open poll brought after SIGTERM.

    The SDK queues such a job and ends without running it.
    """
    from runpod.http_client import AsyncClientSession
    from runpod.serverless.modules.rp_http import send_result
    from runpod.serverless.modules.rp_job import handle_job
    from runpod.serverless.modules.worker_state import JobsProgress

    jobs = [vars(job) for job in JobsProgress()]
    if not jobs:
        return
    log.info("Answering %d job(s) that came while stopping.", len(jobs))
    async with AsyncClientSession() as session:
        for job in jobs:
            try:
                await asyncio.wait_for(handle_job(session, config, job), limit_s)
            except TimeoutError:
                error = Draining("The worker is stopping; send the job again.")
                body = job_error(error_body(error, new_request_id()))
                await send_result(session, body, job, is_stream=True)
