"""Makes this process start Ray's head node faster, and reserves SIGTERM for this process.

`ray.init` starts the head node in this order, in Ray 2.60:

    Node.start_head_processes    GCS, autoscaler ("monitor"), API server
    Node.start_ray_processes     raylet, log monitor; the raylet starts agents and worker processes
    connect                      waits until the GCS lists the node, then connects this driver

`shorten` replaces functions and values of `ray._private` in this process. One machine with one
model needs fewer processes than Ray starts by default:

    Ray's default                    here
    API server, 2 s                  not started: it serves the dashboard, and usage statistics
    autoscaler                       not started: it manages other machines
    dashboard agent of the raylet    a process that only waits (`cat`); its ports are "not in use",
                                     as in Ray's minimal installation, so the raylet does not wait
    port of the runtime env agent    chosen here, so that the raylet does not wait for it
    one worker process per CPU       4: Serve's controller, HAProxy's manager, Serve's own proxy,
                                     and a replica
    Ray's worker program             `ray_worker.py`, which imports a replica's libraries first
    polls for the node every 1 s     polls every 0.02 s
    folders of the session for all   folders for this user alone (`session_folder.py`)
    polls for the application's      polls every 0.1 s
    state every 1 s
    every process handles SIGTERM    SIGTERM is blocked in all processes except this one
    waits up to a second for each    `ray_node.kill` kills all processes at once
    process to end, one by one

Otherwise the order is Ray's. Between the second and the third step this process calls `meanwhile`
and imports Serve's client. tests/test_contract.py checks every name of `ray._private` that is used
here; run it after a change of Ray's version.
"""

import importlib
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

from serve_app.machine.ports import free_port
from serve_app.node import ray_worker, session_folder

NODE_POLL_S = 0.02
"""Seconds between two checks of whether Ray's GCS lists the node."""
NODE_LIMIT_S = 10.0
"""Maximum seconds of this wait; then Ray's own, slower wait follows."""
APP_POLL_S = 0.1
"""Seconds between two checks of whether the application runs; Serve's controller polls as often."""
NUM_WORKERS = 4
"""Worker processes started in advance: Serve's controller, HAProxy's manager, Serve's own proxy,
and a replica."""
RUNTIME_ENV_AGENT_PORT = "runtime_env_agent_port"
UNUSED_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NOT_IN_USE = -1


_meanwhile: list[Callable[[], None]] = []
"""Functions that the next start of Ray calls once."""


def shorten(meanwhile: Callable[[], None]) -> None:
    """Makes this process start Ray and Serve from now on as the module's docstring describes.

    The next start of Ray calls `meanwhile` once, while Ray's processes start. Later calls only
    replace `meanwhile`.
    """
    from ray._private import services
    from ray._private.node import Node

    _meanwhile[:] = [meanwhile]
    if Node.start_api_server is _no_api_server:
        return
    session_folder.keep_private()
    Node.start_api_server = _no_api_server
    Node.start_monitor = _no_monitor
    Node.kill_all_processes = _leave_processes
    Node.start_ray_processes = _with_preparation(Node.start_ray_processes)
    services.start_ray_process = _with_our_flags(services.start_ray_process)


# What replaces functions of `ray._private`.


def _no_api_server(node: Any, *, include_dashboard: Any, raise_on_failure: bool) -> None:
    """Replaces `Node.start_api_server`. The address is "", Ray's value without a dashboard."""
    node._webui_url = ""


def _no_monitor(node: Any) -> None:
    """Replaces `Node.start_monitor`, which starts the autoscaler."""


def _leave_processes(node: Any, **_: Any) -> None:
    """Replaces `Node.kill_all_processes`: `ray_node.kill` kills all of Ray's processes at once."""


def _with_preparation(start_processes: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns `Node.start_ray_processes` with our worker program and ports, and with
    `meanwhile`."""

    def start(node: Any) -> None:
        node._ray_params.worker_path = ray_worker.__file__
        _choose_ports(node)
        start_processes(node)
        _call_meanwhile()
        _shorten_serve()
        _wait_until_known(node)

    return start


def _with_our_flags(start_process: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `services.start_ray_process` with our flags for the raylet, and with SIGTERM blocked.

    systemd and some shells send SIGTERM to a whole process group. Ray's processes would end at
    once, with all requests, and this process would hang for a minute. A process of Ray inherits the
    blocked signals of the thread that starts it, and so do its children; Ray blocks SIGINT in the
    same way. So only this process handles SIGTERM: it lets running requests finish, then kills
    Ray's processes with SIGKILL. `test_run_serves_where_the_yaml_says` in tests/cli checks this.
    """

    def start(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        if process_type == "raylet":
            command = [_raylet_flag(flag) for flag in command]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return start_process(command, process_type, *args, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return start


# What the replacements do.


def _choose_ports(node: Any) -> None:
    """Writes the files in which the raylet finds its agents' ports, so that it does not wait.

    By default each agent writes the file of its port once it listens. The raylet also gets the port
    of the runtime env agent by flag, and passes it to that agent.
    """
    raylet: Any = importlib.import_module("ray._raylet")  # its type stub is incomplete
    port = free_port("0.0.0.0")
    node._ray_params.runtime_env_agent_port = port
    ports = {**dict.fromkeys(UNUSED_PORTS, NOT_IN_USE), RUNTIME_ENV_AGENT_PORT: port}
    for name, number in ports.items():
        raylet.persist_port(node.get_session_dir_path(), node.node_id, name, number)


def _raylet_flag(flag: str) -> str:
    """Returns a flag of the raylet's command line, with our value if it differs from Ray's."""
    name, _, value = flag.partition("=")
    match name:
        case "--num_prestart_python_workers":  # Ray: one per CPU, 128 on a large host
            return f"{name}={NUM_WORKERS}"
        case "--maximum_startup_concurrency":  # Ray: one per CPU, which may be fewer
            return f"{name}={max(NUM_WORKERS, int(value))}"
        case "--dashboard_agent_command":
            # The raylet ends when this process ends. `cat` reads a pipe from the raylet, so it ends
            # with the raylet and not before.
            return f"{name}={shutil.which('cat')}"
    return flag


def _call_meanwhile() -> None:
    while _meanwhile:
        _meanwhile.pop()()


def _shorten_serve() -> None:
    """Imports Serve's client, which takes a second, and makes it poll more often."""
    from ray.serve._private import client

    client.CLIENT_POLLING_INTERVAL_S = APP_POLL_S


def _wait_until_known(node: Any) -> None:
    """Waits until the GCS lists the node; Ray's own wait for the same then ends at once."""
    until = time.monotonic() + NODE_LIMIT_S
    while time.monotonic() < until:
        if node.get_gcs_client().get_all_node_info(timeout=NODE_LIMIT_S):
            return
        time.sleep(NODE_POLL_S)
