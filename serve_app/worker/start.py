"""The worker: banner, Settings, and RunPod's SDK until it is told to stop.

Knows who is who, and the order of beginning and end.
"""

import logging
from pathlib import Path

from serve_app.settings import EntrySettings, Settings
from serve_app.worker import cluster, progress
from serve_app.worker.banner import banner
from serve_app.worker.boot import Boot
from serve_app.worker.handler import Handler
from serve_app.worker.phases import process_age_s
from serve_app.worker.results import Results
from serve_app.worker.sdk import JobLoop

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
    """Takes jobs until SIGTERM and answers every job taken; the exit code."""
    slots = num_slots(settings)
    for line in banner(settings, entry.serve_config, slots, checked):
        log.info("%s", line)
    handler = make_handler(settings, entry.serve_config, progress.post)
    results = Results(settings.runpod.large_results, settings.runpod.volume)
    loop = JobLoop(handler, slots, settings.runpod.drain_s, results)
    try:
        code = loop.run()
    finally:
        cluster.stop()
    log.info("All jobs are answered; the worker ends.")
    return code
