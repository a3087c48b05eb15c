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
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed
from serve_app.load_log import LoadLog, read_lines
from serve_app.settings import ConfigError, Settings, application
from serve_app.worker import phases
from serve_app.worker.forward import Forward, through
from serve_app.worker.killed import MemoryBefore

log = logging.getLogger(__name__)

APP_NAME = "mixtral"
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


async def start(settings: Settings, config: str | Path, process_s: float | None = None) -> Forward:
    """Starts Ray, Serve and the deployment of `config`; returns when the model is loaded.

    `process_s` is what this process took before it took jobs; None is its age.
    Raises `ModelLoadFailed`. Blocking steps run in a thread, so that the event loop stays free.
    """
    loop = asyncio.get_running_loop()
    settings = with_load_log(settings)
    load_log = _begin(settings, process_s)
    # Ray takes over the process's signals, whichever thread starts it. They are given back after
    # each step: a SIGTERM must reach the SDK, which lets running jobs finish.
    with load_log.phase("ray"):
        for step in (_start_ray, _start_serve):
            with _signals_kept():
                await loop.run_in_executor(_thread(), step)
    with _signals_kept():
        try:
            handle = await loop.run_in_executor(_thread(), deploy, settings, config, None)
        except ConfigError as error:
            raise ModelLoadFailed(str(error)) from None
    return through(handle, settings.api.request_timeout_s)


def serve_http(settings: Settings, config: str | Path, port: int) -> Any:
    """Starts the same deployment behind an HTTP proxy on 0.0.0.0:`port`; its handle."""
    load_log = _begin(settings, None)
    with load_log.phase("ray"):
        with _signals_kept():
            _start_ray()
        # From here on signals are the caller's: the model may take minutes to load.
        with _signals_kept():
            _start_serve({"host": "0.0.0.0", "port": port})
    with _signals_kept():
        return deploy(settings, config, "/")


def _begin(settings: Settings, process_s: float | None) -> LoadLog:
    load_log = LoadLog(settings.load_log)
    load_log.start_anew()
    load_log.done("process", phases.process_age_s() if process_s is None else process_s)
    return load_log


def with_load_log(settings: Settings) -> Settings:
    """`settings` with a file that the replica tells its load to, on this machine's own disk."""
    if settings.load_log is not None:
        return settings
    folder = Path(tempfile.mkdtemp(prefix="mixtral-load-"))
    return settings.model_copy(update={"load_log": str(folder / "load.jsonl")})


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
    import ray
    from ray import serve

    from serve_app.app import build_app

    app = _overridden(build_app(settings), application(config))
    require_resources(app._bound_deployment, ray.cluster_resources())
    memory = MemoryBefore()
    LoadLog(settings.load_log).start("replica")  # which ends it, when its process has come up
    try:
        with phases.logged(settings.load_log):
            return serve.run(
                app, name=APP_NAME, route_prefix=route_prefix, logging_config=SERVE_LOGGING
            )
    except RuntimeError as error:
        log.debug("Serve says: %s", error)
        serve.delete(APP_NAME)
        raise _load_failure(settings, memory) from None


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


def require_resources(deployment: Any, available: dict[str, float]) -> None:
    """Raises `ModelLoadFailed` for replicas that do not fit: Serve would wait for ever."""
    options = deployment.ray_actor_options
    for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        # "auto" and autoscaling start with one.
        needed = (options.get(key) or 0) * (deployment.num_replicas or 1)
        has = available.get(kind, 0)
        if needed > has:
            raise ModelLoadFailed(
                f"The deployment needs {needed:g} {kind}s and Ray finds {has:g} on this machine; "
                f"change `{key}` or `num_replicas` under `deployments:`, or `model.device`."
            )


def require_no_failure(load_log: str) -> None:
    """Raises the `ModelLoadFailed` that the replica wrote into `load_log`, if any."""
    for line in read_lines(load_log):
        if line.get("state") == "failed":
            raise ModelLoadFailed(line["error"], retry=line["retry"])


def _load_failure(settings: Settings, memory: MemoryBefore) -> ModelLoadFailed:
    lines = read_lines(settings.load_log) if settings.load_log is not None else []
    try:
        if settings.load_log is not None:
            require_no_failure(settings.load_log)
    except ModelLoadFailed as known:
        return known
    if lines and lines[-1]["state"] in ("started", "running"):
        return memory.killed(settings, lines[-1]["phase"])
    return ModelLoadFailed("The model could not be loaded; the worker's log says why.", retry=True)


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
