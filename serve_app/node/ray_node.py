"""Starts Ray and Serve on this machine, watches their processes, and ends every one of them.

What Ray 2.60 does when one of its processes is killed, as observed:

    raylet      The replica lives and answers for half a minute, until the GCS notices. It is an
                orphan then; this process adopts orphans, to be able to end them.
    GCS         Running calls hang, the driver spins, and after 60 s Ray ends the driver, which is
                this process. So this module ends Ray earlier.
    driver      GCS and raylet end with it, and the replica 3 s later. Ray's agents would wait a
                minute for the GCS; the reaper ends all of them at once.
"""

import asyncio
import contextlib
import functools
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config.serve_config import ConfigError
from serve_app.errors import ServeError
from serve_app.machine import processes
from serve_app.node import head, ray_worker, reaper

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200_000_000
"""Small: requests and answers travel in Ray's messages, and the object store stays empty."""
SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""No line per request, because RunPod drops lines of a log that grows fast."""
GCS = "/gcs_server "
VITAL = {GCS: "Ray's GCS", "/raylet ": "Ray's raylet"}
MARK = "RAY_STARTED_BY"
"""Environment variable of all of Ray's processes, by which the reaper finds them."""


@functools.cache
def _reaper() -> "subprocess.Popen[bytes]":
    """Ends Ray's processes when this process has died, also by `kill -9`."""
    mark = os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
    # The folder of Ray's logs has the id of this process in its name.
    return reaper.start(f"{MARK}={mark}", rf"/session_[^/]*_{os.getpid()}/")


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """The thread that calls Ray's blocking functions, alive as long as this process.

    The kernel ends Ray's processes with the thread that started them (PR_SET_PDEATHSIG). The event
    loop's own threads are unfit for that: they end with the loop, before the shutdown.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")


_running_call: Future[Any] | None = None
_abandoned: list[ThreadPoolExecutor] = []


def in_thread(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Calls `function` in Ray's thread while the event loop runs on."""
    global _running_call
    _running_call = _thread().submit(function, *arguments)
    return asyncio.wrap_future(_running_call)


def leave_thread() -> None:
    """Abandons Ray's thread, which waits for dead processes; the next call gets a new one."""
    _abandoned.append(_thread())
    _thread.cache_clear()


def ended(code: int) -> int:
    """Returns `code`. If a thread was abandoned, ends the process, as Python would wait for it."""
    if _abandoned:
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
    return code


def start(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Starts Ray, if it does not run yet; calls `meanwhile` while its processes start.

    An error that `meanwhile` raises goes to the caller, who must call `stop`.
    """
    import ray
    from ray._private import auto_init_hook

    if ray.is_initialized() and lost() is None:
        return
    kill()
    processes.adopt_orphans()
    # Otherwise objects left from an earlier Ray would start another Ray, with a dashboard.
    auto_init_hook.enable_auto_connect = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Without a token, Ray writes one into the home folder, which a container may lack.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # The monitor counts the page cache of weights as used memory, and would kill the replica.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # HAProxy, too, shares its port with the listener that answers /ping while the model loads.
    os.environ.setdefault("SERVE_SOCKET_REUSE_PORT_ENABLED", "1")
    # Workers start with the raylet, not when this process connects to it.
    os.environ.setdefault("RAY_enable_worker_prestart", "1")
    _reaper()
    head.shorten(meanwhile)
    init = functools.partial(
        ray.init,
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    try:
        init()
    except (ConfigError, ServeError):  # raised by `meanwhile`
        raise
    except Exception as error:
        # On a busy machine Ray's processes may wait in vain for each other, 30 s each.
        log.warning("Ray did not start (%s); trying once more.", error)
        kill()
        init()


def start_serve(http_options: dict[str, Any] | None = None) -> None:
    """Starts Serve's controller, and its proxy where there are `http_options`."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "Disabled" if http_options is None else "HeadOnly"
    serve.start(proxy_location=location, http_options=http_options, logging_config=SERVE_LOGGING)


def vital() -> "dict[str, psutil.Process]":
    """The processes that Ray needs, by the names that messages use for them."""
    commands = [(it, processes.command(it)) for it in below()]
    return {name: it for words, name in VITAL.items() for it, line in commands if words in line}


def lost() -> str | None:
    """The name of a process that Ray needs and that has died; None if all live."""
    import ray

    if not ray.is_initialized():
        return None
    alive = vital()
    return next((name for name in VITAL.values() if name not in alive), None)


def below() -> "list[psutil.Process]":
    """All of Ray's processes below this one."""
    import ray

    folder = Path(ray.__file__).parent
    programs = f"{folder}{os.sep}", f"{folder}_haproxy{os.sep}", ray_worker.__file__
    commands = ((it, processes.command(it)) for it in processes.descendants())
    return [
        process
        for process, line in commands
        if line.startswith("ray::") or any(program in line for program in programs)
    ]


def stop() -> None:
    """Ends Ray, also while it starts; the caller must pass its exit code through `ended` then.

    It kills the processes, so call it when no request runs any more. Serve's own shutdown would
    take half a minute, and would wait for a model that loads. If Ray is still starting, its
    processes end when this one does.
    """
    if _running_call is not None and not _running_call.done():
        # `ended` ends this process now, and the reaper Ray's. The other way round, Ray would end
        # this process with code 1.
        leave_thread()
        return
    with signals_kept():
        kill()
    if _reaper.cache_info().currsize:
        # Nothing is left for the reaper.
        with _reaper() as process:
            process.kill()
        _reaper.cache_clear()


def kill() -> None:
    """Kills Ray in any state, also half started."""
    import ray

    if ray.is_initialized():
        # Ray ends this process with code 1 as soon as it sends a word to a raylet that is gone. So
        # it is disconnected first. Where Ray is dead already, that calls the GCS, and waits for
        # seconds if it is the GCS that is gone; so the others end first.
        if lost() is not None:
            processes.kill(lambda: [it for it in below() if GCS not in processes.command(it)])
        ray.shutdown()
    _end_all()


def _end_all() -> None:
    if left := processes.kill(below):
        names = ", ".join(processes.command(process).split(" ")[0] for process in left)
        log.error("These processes of Ray cannot be ended: %s", names)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Restores the handlers of SIGTERM and SIGINT after the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
