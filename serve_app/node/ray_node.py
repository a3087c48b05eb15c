"""Ray and Serve on this machine, for one process: started, watched, and ended to the last process.

What Ray does when parts of it are killed (2.60, each seen):

    raylet      The replica lives on and answers for half a minute, until Ray's GCS misses the
                raylet. It is an orphan then, which only its parent's adopter finds.
    GCS         Calls that run hang, the driver spins, and after 60 s Ray ends the driver: this
                process, with all that it has taken on. So nobody waits for that here.
    driver      GCS and raylet end with it, the replica 3 s later, and Ray's two agents would wait
                a minute for the GCS: a reaper ends them all at once.

Knows no deployment and no jobs.
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

from serve_app.machine import processes
from serve_app.node import head, reaper

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200_000_000
"""Requests and answers travel through Ray's messages; the object store stays all but empty."""
SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""The handler logs a line per job, and the platform drops lines from chatty logs."""
GCS = "/gcs_server "
VITAL = {GCS: "Ray's GCS", "/raylet ": "Ray's raylet"}
MARK = "RAY_STARTED_BY"
"""In the environment of all of Ray's processes: how they are found when this one is dead."""


@functools.cache
def _reaper() -> "subprocess.Popen[bytes]":
    """Ends Ray's processes when this one has died, whatever killed it."""
    mark = os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
    # The folder of Ray's logs, which has our number in its name.
    return reaper.start(f"{MARK}={mark}", rf"/session_[^/]*_{os.getpid()}/")


@functools.cache
def _thread() -> ThreadPoolExecutor:
    """The one thread that starts Ray, alive as long as this process.

    The kernel ends Ray's processes with the thread that started them (PR_SET_PDEATHSIG), so none
    of the event loop's own threads will do: those end with the loop, before the shutdown.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")


_step: Future[Any] | None = None
_left: list[ThreadPoolExecutor] = []


def in_thread(step: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Takes a step of Ray's, in the thread that is Ray's, while the event loop goes on."""
    global _step
    _step = _thread().submit(step, *arguments)
    return asyncio.wrap_future(_step)


def leave_thread() -> None:
    """The next step has another thread: this one waits for processes that are dead."""
    _left.append(_thread())
    _thread.cache_clear()


def ended(code: int) -> int:
    """`code`; where a thread was left, ends the process with it, as Python would wait for it."""
    if _left:
        sys.stdout.flush()
        logging.shutdown()
        os._exit(code)
    return code


def start() -> None:
    """Starts Ray where it does not run yet."""
    import ray
    from ray._private import auto_init_hook

    if ray.is_initialized() and lost() is None:
        return
    kill()
    processes.adopt_orphans()
    # Else whatever is left of an earlier Ray's client starts another one, with a dashboard.
    auto_init_hook.enable_auto_connect = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A token of this process's own: Ray would write one into a home that a container may not have.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # It counts the page cache of weights being read as used memory, and kills the replica.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    _reaper()
    head.shorten()
    init = functools.partial(
        ray.init,
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )
    try:
        init()
    except Exception as error:
        # On a busy machine its processes may miss each other: each waits 30 s for the next.
        log.warning("Ray did not start (%s); once more.", error)
        kill()
        init()


def start_serve(http_options: dict[str, Any] | None = None) -> None:
    """Starts Serve's controller, and its proxy where there are `http_options`."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "Disabled" if http_options is None else "HeadOnly"
    serve.start(proxy_location=location, http_options=http_options, logging_config=SERVE_LOGGING)


def vital() -> "dict[str, psutil.Process]":
    """The processes that Ray cannot do without, by the name to tell of them."""
    commands = [(it, processes.command(it)) for it in below()]
    return {name: it for words, name in VITAL.items() for it, line in commands if words in line}


def lost() -> str | None:
    """Which vital process has gone from a Ray that this process has started; None: none."""
    import ray

    if not ray.is_initialized():
        return None
    alive = vital()
    return next((name for name in VITAL.values() if name not in alive), None)


def below() -> "list[psutil.Process]":
    """All of Ray's processes below this one."""
    import ray

    ours = f"{Path(ray.__file__).parent}{os.sep}"
    commands = ((it, processes.command(it)) for it in processes.descendants())
    return [it for it, line in commands if line.startswith("ray::") or ours in line]


def stop() -> None:
    """Ends Ray, where it runs or is being started; `ended` must end this process then.

    By force, for when nobody is being answered any more: Serve's own farewell waits for half a
    minute, or for a model that loads.
    """
    if _step is not None and not _step.done():
        _end_all()
        leave_thread()
        return  # to the reaper, as that thread may be about to start more
    with signals_kept():
        kill()
    if _reaper.cache_info().currsize:
        # There is nothing left for it to do.
        with _reaper() as process:
            process.kill()
        _reaper.cache_clear()


def kill() -> None:
    """Ends Ray in whatever state it is, half started too, without asking its other parts."""
    import ray

    if ray.is_initialized():
        # This process takes its leave from the GCS, and waits for it for seconds where it is gone.
        processes.kill(lambda: [it for it in below() if GCS not in processes.command(it)])
        ray.shutdown()
    _end_all()


def _end_all() -> None:
    if left := processes.kill(below):
        names = ", ".join(processes.command(process).split(" ")[0] for process in left)
        log.error("These processes of Ray cannot be ended: %s", names)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
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
