"""Ray and Serve on this machine, for one process: start, reach, stop.

Takes the same file as `serve run`, but no HTTP proxy unless asked: jobs reach the deployment
through a handle. Knows Ray; knows no jobs.
"""

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

from serve_app.errors import EngineDead, InternalError, ModelLoadFailed, QueueFull, ServeError
from serve_app.protocol.call import Call
from serve_app.settings import ConfigError, Settings, application
from serve_app.worker import progress
from serve_app.worker.boot import Forward

log = logging.getLogger(__name__)

APP_NAME = "mixtral"
OBJECT_STORE_BYTES = 200_000_000
"""Requests and answers travel through Ray's messages; the object store stays all but empty."""


async def start(settings: Settings, config: str | Path) -> Forward:
    """Starts Ray, Serve and the deployment of `config`; returns when the model is loaded.

    Raises `ModelLoadFailed`. Blocking steps run in threads, so that the event loop stays free.
    """
    # Ray takes over the process's signals, whichever thread starts it. They are given back after
    # each step: a SIGTERM must reach the SDK, which lets running jobs finish.
    for step in (_start_ray, _start_serve):
        with _signals_kept():
            await asyncio.to_thread(step)
    with _signals_kept():
        try:
            handle = await asyncio.to_thread(deploy, settings, config, None)
        except ConfigError as error:
            raise ModelLoadFailed(str(error)) from None
    # One handle for all calls: each copy would start its own metrics pusher and long poll.
    handle = handle.options(stream=True)
    return lambda call: _forward(handle, call)


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
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )


def _start_serve(http_options: dict[str, Any] | None = None) -> None:
    from ray import serve

    location = "Disabled" if http_options is None else "HeadOnly"
    serve.start(proxy_location=location, http_options=http_options)


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
        return serve.run(app, name=APP_NAME, route_prefix=route_prefix)
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
    # One try per job that asks: whatever failed, the next job's try is the second.
    options: dict[str, Any] = {"max_constructor_retry_count": 1}
    for override in given.get("deployments") or []:
        if override.get("name") != deployment.name:
            raise ConfigError(f"`deployments`: there is no deployment {override.get('name')!r}.")
        options |= {key: value for key, value in override.items() if key != "name"}
    try:
        return Application(deployment.options(**options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`deployments`: {error}") from None


def _load_failure(settings: Settings) -> ModelLoadFailed:
    written = progress.phases(settings.load_log) if settings.load_log else []
    for line in reversed(written):
        if "error" in line:
            return ModelLoadFailed(str(line["error"]), retry=bool(line.get("retry", False)))
    return ModelLoadFailed("The model could not be loaded; the worker's log says why.", retry=True)


async def _forward(handle: Any, call: Call) -> AsyncGenerator[dict[str, Any], None]:
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    response = handle.call.remote(call.method, call.path, call.body, call.request_id)
    try:
        async for item in response:
            yield item
    except (RayError, RayServeException) as error:
        raise _as_serve_error(error) from error
    finally:
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
