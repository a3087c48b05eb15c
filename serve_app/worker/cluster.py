"""Ray and Serve on this machine, for one process: start, reach, stop.

Takes the same file as `serve run`, but no HTTP proxy unless asked: jobs reach the deployment
through a handle. Knows Ray; knows no jobs.
"""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_app.errors import EngineDead, InternalError, ModelLoadFailed, QueueFull, ServeError
from serve_app.protocol.call import Call
from serve_app.settings import ConfigError, Settings, application
from serve_app.worker import progress
from serve_app.worker.boot import Forward

log = logging.getLogger(__name__)

APP_NAME = "mixtral"
GRACE_S = 10.0
"""How much later than the deployment this door ends a request, should no replica do it."""
OBJECT_STORE_BYTES = 200_000_000
"""Requests and answers travel through Ray's messages; the object store stays all but empty."""
SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""The handler logs a line per job, and the platform drops lines from chatty logs."""


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """The one thread that starts Ray, alive as long as this process.

    The kernel ends Ray's processes with the thread that started them (PR_SET_PDEATHSIG), so none
    of the event loop's own threads will do: those end with the loop, before the shutdown.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")


async def start(settings: Settings, config: str | Path) -> Forward:
    """Starts Ray, Serve and the deployment of `config`; returns when the model is loaded.

    Raises `ModelLoadFailed`. Blocking steps run in a thread, so that the event loop stays free.
    """
    began = time.monotonic()
    loop = asyncio.get_running_loop()
    # Ray takes over the process's signals, whichever thread starts it. They are given back after
    # each step: a SIGTERM must reach the SDK, which lets running jobs finish.
    for step in (_start_ray, _start_serve):
        with _signals_kept():
            await loop.run_in_executor(_thread(), step)
    with _signals_kept():
        try:
            handle = await loop.run_in_executor(_thread(), deploy, settings, config, None)
        except ConfigError as error:
            raise ModelLoadFailed(str(error)) from None
    _log_phases(settings, time.monotonic() - began)
    # One handle for all calls: each copy would start its own metrics pusher and long poll.
    handle = handle.options(stream=True)
    limit_s = settings.api.request_timeout_s + GRACE_S
    return lambda call: _forward(handle, call, limit_s)


def serve_http(settings: Settings, config: str | Path, port: int) -> None:
    """Starts the same deployment behind an HTTP proxy on 0.0.0.0:`port`."""
    with _signals_kept():
        _start_ray()
        _start_serve({"host": "0.0.0.0", "port": port})
        deploy(settings, config, "/")


def stop() -> None:
    """Ends the deployment, Serve and Ray, where they run."""
    import ray
    from ray import serve

    if ray.is_initialized():
        with _signals_kept():
            serve.shutdown()
            ray.shutdown()


def _start_ray() -> None:
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A token of this process's own: Ray would write one into a home that a container may not have.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # It counts the page cache of weights being read as used memory, and kills the replica.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )


def _start_serve(http_options: dict[str, Any] | None = None) -> None:
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "Disabled" if http_options is None else "HeadOnly"
    serve.start(proxy_location=location, http_options=http_options, logging_config=SERVE_LOGGING)


def deploy(settings: Settings, config: str | Path, route_prefix: str | None) -> Any:
    """Deploys `config`'s application and waits for its model; its handle. Blocks.

    Raises `ModelLoadFailed` with the cause that the replica wrote into the load log.
    """
    from ray import serve

    from serve_app.app import build_app

    app = _overridden(build_app(settings), application(config))
    if settings.load_log:
        Path(settings.load_log).unlink(missing_ok=True)
    try:
        return serve.run(
            app, name=APP_NAME, route_prefix=route_prefix, logging_config=SERVE_LOGGING
        )
    except RuntimeError as error:
        log.debug("Serve says: %s", error)
        serve.delete(APP_NAME)
        raise _load_failure(settings) from None


def _overridden(app: Any, given: dict[str, Any]) -> Any:
    """`app` with the `deployments:` overrides of the YAML; says which other keys it ignores."""
    from ray.serve import Application

    ignored = sorted(given.keys() - {"name", "route_prefix", "import_path", "args", "deployments"})
    if ignored:
        log.warning("Ignored by this door: %s of the application.", ", ".join(ignored))
    deployment = app._bound_deployment
    options: dict[str, Any] = {}
    for override in given.get("deployments") or []:
        if override.get("name") != deployment.name:
            raise ConfigError(f"`deployments`: there is no deployment {override.get('name')!r}.")
        options |= {key: value for key, value in override.items() if key != "name"}
    try:
        return Application(deployment.options(**options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`deployments`: {error}") from None


def _load_failure(settings: Settings) -> ModelLoadFailed:
    for line in progress.lines(settings.load_log) if settings.load_log else []:
        if line.get("state") == "failed":
            return ModelLoadFailed(line["error"], retry=line["retry"])
    return ModelLoadFailed("The model could not be loaded; the worker's log says why.", retry=True)


def _log_phases(settings: Settings, seconds: float) -> None:
    """The cold start in one line."""
    written = progress.lines(settings.load_log) if settings.load_log else []
    phases = ", ".join(
        f"{phase['phase']} {phase['seconds']:.1f} s" for phase in progress.summary(written)["load"]
    )
    log.info("Ready after %.1f s with Ray; the load: %s", seconds, phases)


async def _forward(handle: Any, call: Call, limit_s: float) -> AsyncGenerator[dict[str, Any], None]:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    response = handle.call.remote(call.method, call.path, call.body, call.request_id)
    is_over = False
    try:
        async with asyncio.timeout(limit_s):
            async for item in response:
                yield item
        is_over = True
    except (RayError, RayServeException) as error:
        raise _as_serve_error(error) from error
    finally:
        if not is_over:
            response.cancel()


def _as_serve_error(error: Exception) -> ServeError:
    from ray.exceptions import RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError

    if isinstance(error, BackPressureError):
        return QueueFull("The queue is full; try again in a moment.", retry_after_s=1)
    if isinstance(error, RayTaskError | TaskCancelledError):
        log.error("The deployment raised", exc_info=error)
        return InternalError("An internal error occurred; please report it with the request id.")
    log.warning("The replica is gone: %s", type(error).__name__)
    return EngineDead("The model's process ended; send the request again.")


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Puts the handlers of SIGTERM and SIGINT back where they were."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
