"""Starts Ray and Serve on this machine, and ends all of their processes.

`head.py` makes Ray start faster, `ray_processes.py` finds and kills its processes, and
`ray_thread.py` calls it for an event loop. This module changes these defaults of Ray 2.60:

    Ray's default                           here
    replaces SIGTERM's and SIGINT's         `signals_kept` restores the caller's handlers
    handlers
    starts by itself when it is used        starts only in `start`; otherwise a call after Ray's
                                            death would start another Ray, with a dashboard
    writes a token into the home folder     a token of this process, in its environment, because a
                                            container may have no home folder
    kills workers if memory is short        off: it counts the page cache of the weights as used
    HAProxy does not share its port         it shares the port with the listener that answers /ping
                                            while the model is loading
    starts workers when a driver connects   starts them with the raylet, so that they import earlier
    ends idle workers beyond one per CPU    keeps the workers that are started in advance: one of
                                            them has imported the replica's libraries
    sends usage statistics                  off
    serve.shutdown, ray.shutdown at the     kills all processes: Serve's shutdown takes half a
    end                                     minute, and waits for a model that is loading

tests/node/test_cluster.py checks the start and the signals, tests/faults checks the ends.
"""

import contextlib
import functools
import logging
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

from serve_app.config.serve_config import ConfigError
from serve_app.errors import ModelLoadFailed, ServeError
from serve_app.machine import processes
from serve_app.node import head, ray_processes, ray_thread, reaper

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 200_000_000
"""Size of Ray's object store. It is small, because requests and answers are Ray's messages, which
do not use the store."""
SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""No line per request, because RunPod drops lines of a log that grows fast."""
NOT_STARTED = (
    "Ray did not start on this machine; the log has its reason. Usual causes are a limit of "
    "processes and threads below 300 (`ulimit -u`, `--pids-limit`), and a machine without its "
    "loopback interface."
)
MARK = "RAY_STARTED_BY"
"""Environment variable of all of Ray's processes. The reaper finds them by its value."""


def start(meanwhile: Callable[[], None] = lambda: None) -> None:
    """Starts Ray if it is not running; calls `meanwhile` while its processes start.

    Raises `ModelLoadFailed` if Ray does not start twice. An error that `meanwhile` raises is passed
    to the caller. In both cases the caller must call `stop`.
    """
    import ray

    if ray.is_initialized() and ray_processes.lost() is None:
        return
    kill()
    processes.adopt_orphans()
    _configure()
    _reaper()
    head.shorten(meanwhile)
    try:
        _init()
    except (ConfigError, ServeError):  # raised by `meanwhile`
        raise
    except Exception as error:
        # On a busy machine Ray's processes may wait in vain for each other, 30 s each.
        log.warning("Ray did not start (%s); starting it once more.", error)
        kill()
        _init_again()


def _init_again() -> None:
    try:
        _init()
    except Exception as error:
        log.error("Ray did not start again (%s).", error)
        raise ModelLoadFailed(NOT_STARTED, retry=True) from error


def _configure() -> None:
    """Sets the environment variables that Ray reads when it starts, unless the user has set
    them."""
    from ray._private import auto_init_hook

    auto_init_hook.enable_auto_connect = False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # With Ray's niceness of 15, every other process of the machine would have precedence over the
    # replica and HAProxy.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("SERVE_SOCKET_REUSE_PORT_ENABLED", "1")
    os.environ.setdefault("RAY_enable_worker_prestart", "1")
    os.environ.setdefault("RAY_num_workers_soft_limit", str(head.NUM_WORKERS))


def _init() -> None:
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.ERROR,
    )


@functools.cache
def _reaper() -> "subprocess.Popen[bytes]":
    """Ends Ray's processes when this process has died, also by `kill -9`."""
    mark = os.environ[MARK] = f"{os.getpid()}-{secrets.token_hex(8)}"
    # The folder of Ray's logs has the id of this process in its name.
    return reaper.start(f"{MARK}={mark}", rf"/session_[^/]*_{os.getpid()}/")


def start_serve(http_options: dict[str, Any] | None = None) -> None:
    """Starts Serve's controller and, with `http_options`, its proxy."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    location = "Disabled" if http_options is None else "HeadOnly"
    serve.start(proxy_location=location, http_options=http_options, logging_config=SERVE_LOGGING)


def stop() -> None:
    """Ends Ray, also while it starts. Call it when no request is running.

    The caller must then pass its exit code through `ray_thread.ended`: if Ray is still starting,
    its processes end when this process does.
    """
    if ray_thread.is_busy():
        # `ended` ends this process now, and the reaper Ray's. The other way round, Ray would end
        # this process with code 1.
        ray_thread.leave()
        return
    with signals_kept():
        kill()
    if _reaper.cache_info().currsize:
        # The reaper has nothing left to do.
        with _reaper() as process:
            process.kill()
        _reaper.cache_clear()


def kill() -> None:
    """Kills Ray in any state, even if it is only partly started.

    Ray ends this process with code 1 as soon as it sends a message to a raylet that is gone, so
    `ray.shutdown` disconnects it before its processes are killed. If one of them has already died,
    the others are killed first, except the GCS: `ray.shutdown` calls it, and waits for seconds if
    it is gone.
    """
    import ray

    if ray.is_initialized():
        if ray_processes.lost() is not None:
            ray_processes.kill_all_but_gcs()
        ray.shutdown()
    ray_processes.kill()


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Restores the handlers of SIGTERM and SIGINT after the block, in which Ray replaces them.

    It has no effect outside the main thread, because Python sets handlers only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
