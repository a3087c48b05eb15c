"""RunPod's SDK: its import, its fitness checks, and its loop with our functions.

The SDK's checks and heartbeat are used unchanged. `SdkLoop` replaces the parts that lose jobs:
polls without a pause, a queue of jobs that is dropped at the end, and posts that are not repeated.

Only this module imports the SDK. Its version is pinned; `tests/worker/test_sdk_contract.py` checks
the properties that this module relies on.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config.settings import ConfigError

if TYPE_CHECKING:
    from aiohttp import ClientSession

CPUINFO = Path("/proc/cpuinfo")


def import_sdk() -> None:
    """Imports `runpod`, without the second that it spends on measuring the processor's clock.

    Its debugger's module, unused without `--rp_debugger`, takes the processor's name from
    py-cpuinfo, which starts a process that counts ticks for a second. Raises `ConfigError` for a
    log level that the SDK does not have.
    """
    import cpuinfo

    measure = cpuinfo.get_cpu_info
    cpuinfo.get_cpu_info = processor_name
    try:
        import runpod  # noqa: F401
    except ValueError as error:
        raise ConfigError(
            f"RUNPOD_LOG_LEVEL must be TRACE, DEBUG, INFO, WARN or ERROR ({error})."
        ) from None
    finally:
        cpuinfo.get_cpu_info = measure


def processor_name() -> dict[str, str]:
    """Returns the processor's name in py-cpuinfo's form; {} if the kernel does not give it
    (ARM)."""
    for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return {"brand_raw": value.strip()}
    return {}


def register_checks(checks: Sequence[Callable[[], None]]) -> None:
    """Makes the SDK run `checks` before it takes jobs. One that raises ends the worker."""
    from runpod.serverless import register_fitness_check

    for check in checks:
        register_fitness_check(check)


class SdkLoop:
    """The SDK's loop around three functions, which it calls in its own event loop.

    `take(session)` polls once for jobs and starts them; it is called again when it returns.
    `stop_jobs(session)` is called once; it stops jobs until the last one is answered.
    `begin_drain()` is called at every SIGTERM and SIGINT, and by `end`.
    """

    def __init__(
        self,
        max_jobs: int,
        take: Callable[["ClientSession"], Awaitable[None]],
        stop_jobs: Callable[["ClientSession"], Awaitable[None]],
        begin_drain: Callable[[], None],
    ) -> None:
        self._max_jobs = max_jobs
        self._take = take
        self._stop_jobs = stop_jobs
        self._begin_drain = begin_drain
        self._scaler: Any = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    def run(self) -> None:
        """Blocks until `end` or a signal, and then until `take` and `stop_jobs` have returned."""
        import runpod
        from runpod.serverless.modules import rp_scale

        build = rp_scale.JobScaler

        def wired(config: dict[str, Any]) -> Any:
            self._scaler = build(config)
            self._wire(self._scaler)
            return self._scaler

        rp_scale.JobScaler = wired
        config = {
            "handler": _never_called,
            # A constant, because the SDK stops polling after a change until the worker is idle. One
            # more than can run, because the SDK sleeps a second when no slot is free.
            "concurrency_modifier": lambda _: self._max_jobs + 1,
        }
        runpod.serverless.start(config)

    def end(self) -> None:
        """Ends the loop, with `begin_drain` first. The open poll is not cut off."""
        self._scaler.kill_worker()

    @property
    def is_ending(self) -> bool:
        """Whether `end` was called or a signal has arrived; `begin_drain` may be called a moment
        later."""
        return not self._scaler.is_alive()

    def started(self, job_id: str) -> None:
        """Counts a job, which the SDK's pings name from now on."""
        self._scaler.job_progress.add(job_id)

    def finished(self, job_id: str) -> None:
        self._scaler.job_progress.remove(job_id)

    def _wire(self, scaler: Any) -> None:
        shut_down = scaler.kill_worker

        def kill_worker() -> None:
            shut_down()
            if self._event_loop is not None:
                # Called in a signal handler, which does not wake the event loop. The signal may
                # also come after the end of the loop.
                with contextlib.suppress(RuntimeError):
                    self._event_loop.call_soon_threadsafe(self._begin_drain)

        async def fetch_jobs(session: "ClientSession", _: int) -> list[Any]:
            self._event_loop = asyncio.get_running_loop()
            await self._take(session)
            return []  # the SDK's own queue of jobs stays empty

        async def fetch_stops(session: "ClientSession") -> list[str]:
            self._event_loop = asyncio.get_running_loop()
            await self._stop_jobs(session)
            return []

        scaler.kill_worker = kill_worker
        # Without the SDK's limits of time: a poll has its own, and `stop_jobs` lasts until the end.
        scaler.jobs_fetcher, scaler.jobs_fetcher_timeout = fetch_jobs, None
        scaler.stop_signals_fetcher, scaler.stop_signals_fetcher_timeout = fetch_stops, None


async def _never_called(job: dict[str, Any]) -> None:
    """The handler that the SDK's configuration must have, but never calls."""
    raise AssertionError("`SdkLoop` starts the jobs.")


def take_url(num_jobs: int) -> str:
    """Returns the URL of a poll for at most `num_jobs` jobs."""
    from runpod.serverless.modules import rp_job

    return str(rp_job._job_get_url(num_jobs))


def stop_url() -> str | None:
    """Returns the URL of a poll for stops; None if it cannot be derived from the URL for jobs."""
    from runpod.serverless.modules import rp_job

    url: str | None = rp_job._job_stop_url()
    return url


def post_urls() -> tuple[str, str]:
    """Returns the URLs of chunks and of results, with `$ID` in place of the job's id."""
    from runpod.serverless.modules import rp_http

    return rp_http.JOB_STREAM_URL, rp_http.JOB_DONE_URL
