"""Creates the worker's parts and runs them until SIGTERM."""

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from pathlib import Path

from serve_app.cold_start.check import Checked
from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.serve_config import num_replicas
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed, ServeError
from serve_app.machine import processes
from serve_app.machine.volume import volume_folder
from serve_app.node import fitness, ray_node, ray_thread
from serve_app.node.banner import banner
from serve_app.node.cluster import Cluster, with_load_log
from serve_app.start_plan.plan import StartPlan
from serve_app.worker.handler import Handler
from serve_app.worker.job_loop import JobLoop
from serve_app.worker.result import LargeResults
from serve_app.worker.sdk import import_sdk, register_checks
from serve_app.worker.supervisor import StartupSupervisor

log = logging.getLogger(__name__)


def make_handler(
    settings: Settings,
    config: str | Path,
    plan: StartPlan | None,
    error: ModelLoadFailed | None = None,
    gave_up: Callable[[], None] = lambda: None,
) -> Handler:
    """Returns the handler for the deployment that `config` describes. Starts nothing yet.

    `plan` is None if the check failed; then the replica makes its own. `error` is the reason why no
    start can succeed. `gave_up` is called if the model has died and is not started again.
    """
    settings = with_load_log(settings)
    process_s = processes.own_age_s()  # the first job may come much later
    cluster = Cluster(settings, config, plan, process_s)
    cold = ColdStart(settings, plan)
    supervisor = StartupSupervisor(
        lambda: cold.around(cluster.start),
        error,
        watch=cluster.watch,
        stop=cluster.stop,
        gave_up=gave_up,
    )
    return Handler(
        supervisor,
        outlook=cold.outlook,
        load_log=settings.load_log or "",
        progress_interval_s=settings.runpod.progress_interval_s,
        max_body_bytes=settings.api.max_body_bytes,
        model_name=settings.model.served_model_names[0],
    )


def num_slots(settings: Settings, replicas: int = 1) -> int:
    """Returns the maximum number of concurrent prompts.

    The number is a little higher than the engines can run, so that no engine waits for a job.
    """
    engine = settings.engine
    more = engine.max_waiting // 4
    return settings.runpod.max_concurrency or engine.max_num_seqs * replicas + more


def run(settings: Settings, config: str, checked: Checked | ModelLoadFailed) -> int:
    """Takes jobs until SIGTERM and answers all of them. Returns the exit code.

    `checked` is the check's result or its error. If the machine is unfit, the worker ends as
    unhealthy. If the error is final, every job fails with it; otherwise the first job starts the
    model.
    """
    if isinstance(checked, ModelLoadFailed):
        plan, lines, failure = None, list[str](), checked
    else:
        plan, lines, failure = checked.plan, checked.lines, None
    final = failure if failure is not None and not failure.retry else None
    slots = num_slots(settings, num_replicas(config))
    for line in banner(settings, config, slots, lines, final):
        log.info("%s", line)
    checks = fitness.checks(settings, failure)
    import_sdk()
    register_checks(checks)
    processes.end_forks_with_this()
    handler = make_handler(settings, config, plan, final, gave_up=lambda: loop.end(1))
    large_results = LargeResults(
        settings.runpod.large_results, volume_folder(settings.runpod.volume)
    )
    loop = JobLoop(handler, slots, settings.runpod.drain_s, large_results)
    may_take_jobs = True
    try:
        if settings.runpod.start == "eager" and fitness.first_problem(checks) is None:
            may_take_jobs = load_now(handler.supervisor)
        code = loop.run() if may_take_jobs else 0
    finally:
        ray_node.stop()
    log.info("All jobs are answered; the worker ends.")
    return ray_thread.ended(code)


def load_now(supervisor: StartupSupervisor) -> bool:
    """Starts the model before any job is taken. A failure is kept for the jobs.

    Returns False if SIGTERM or SIGINT came first. Only the main thread may call it.
    """

    def stop(*_: object) -> None:
        raise SystemExit

    old_handlers = {
        number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        asyncio.run(_ready(supervisor))
        return True
    except SystemExit:
        log.info("Stopped before any job was taken.")
        return False
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)


async def _ready(supervisor: StartupSupervisor) -> None:
    with contextlib.suppress(ServeError):  # logged by the supervisor, and raised for every job
        await supervisor.ready()
