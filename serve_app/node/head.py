"""Shortens the start of Ray's head node in this process.

What `ray.init` of Ray 2.60 does that one machine with one model has no use for:

    API server          serves usage statistics even without a dashboard; takes 2 s. Left out.
    autoscaler          manages other machines. Left out.
    dashboard agent     collects Ray's own metrics for a dashboard; the raylet waits for its ports.
                        Left out: the ports are "not in use", as in Ray's minimal installation.
    runtime env agent   the raylet waits for its port. It is chosen here, so that nothing waits.
    shutdown            gives each of its processes a second to end. They are killed at once here.
    workers             one process per CPU starts in advance, 128 on a large host. Here 3.
    polling             asks once a second whether the node and the application are up. Here faster.

The worker processes run `ray_worker.py`: one of them imports a replica's libraries meanwhile. This
process imports Serve, and may do other work. tests/test_contract.py holds what is used of
`ray._private`.
"""

import importlib
import shutil
import socket
import time
from collections.abc import Callable
from typing import Any

from serve_app.node import ray_worker

NODE_POLL_S = 0.02
"""Seconds between two checks of whether Ray's GCS lists the node."""
NODE_LIMIT_S = 10.0
"""Seconds after which Ray's own, slower wait takes over."""
APP_POLL_S = 0.1
"""Seconds between two checks of whether the application runs; Serve's controller polls as often."""
NUM_WORKERS = 3
"""Worker processes started in advance: Serve's controller, its proxy, and a replica."""
RUNTIME_ENV_AGENT_PORT = "runtime_env_agent_port"
UNUSED_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")
NOT_IN_USE = -1


_meanwhile: list[Callable[[], None]] = []
"""Called and emptied by the next start of Ray."""


def shorten(meanwhile: Callable[[], None]) -> None:
    """Changes how this process starts Ray and Serve from now on, as the module describes.

    The next start of Ray calls `meanwhile` once, while its processes start.
    """
    from ray._private import services
    from ray._private.node import Node

    _meanwhile[:] = [meanwhile]
    if Node.start_api_server is _no_api_server:
        return
    Node.start_api_server = _no_api_server
    Node.start_monitor = _no_monitor
    Node.kill_all_processes = _leave_processes
    start_processes, start_process = Node.start_ray_processes, services.start_ray_process

    def start_and_connect(node: Any) -> None:
        node._ray_params.worker_path = ray_worker.__file__
        _choose_ports(node)
        start_processes(node)
        _call_meanwhile()
        _import_serve()
        _wait_until_known(node)

    Node.start_ray_processes = start_and_connect
    services.start_ray_process = _with_short_raylet(start_process)


def _no_api_server(node: Any, *, include_dashboard: Any, raise_on_failure: bool) -> None:
    node._webui_url = ""  # as Ray has it without a dashboard


def _no_monitor(node: Any) -> None: ...


def _leave_processes(node: Any, **_: Any) -> None:
    """Leaves Ray's processes to `ray_node.kill`, which kills all of them at once."""


def _choose_ports(node: Any) -> None:
    """Writes the ports that the raylet would wait for its agents to write."""
    raylet: Any = importlib.import_module("ray._raylet")  # its type stub is incomplete
    with socket.create_server(("0.0.0.0", 0)) as free:
        port = free.getsockname()[1]
    node._ray_params.runtime_env_agent_port = port
    ports = {**dict.fromkeys(UNUSED_PORTS, NOT_IN_USE), RUNTIME_ENV_AGENT_PORT: port}
    for name, number in ports.items():
        raylet.persist_port(node.get_session_dir_path(), node.node_id, name, number)


def _with_short_raylet(start_process: Callable[..., Any]) -> Callable[..., Any]:
    def start(command: list[str], process_type: str, *args: Any, **options: Any) -> Any:
        if process_type == "raylet":
            command = [_short_flag(flag) for flag in command]
        return start_process(command, process_type, *args, **options)

    return start


def _short_flag(flag: str) -> str:
    """A flag of the raylet's command line, changed where this module wants another value."""
    name, _, value = flag.partition("=")
    match name:
        case "--num_prestart_python_workers":
            return f"{name}={NUM_WORKERS}"
        case "--maximum_startup_concurrency":
            return f"{name}={max(NUM_WORKERS, int(value))}"
        case "--dashboard_agent_command":
            # A process that ends with the raylet, whose pipe is its standard input.
            return f"{name}={shutil.which('cat')}"
    return flag


def _call_meanwhile() -> None:
    while _meanwhile:
        _meanwhile.pop()()


def _import_serve() -> None:
    from ray.serve._private import client

    client.CLIENT_POLLING_INTERVAL_S = APP_POLL_S


def _wait_until_known(node: Any) -> None:
    until = time.monotonic() + NODE_LIMIT_S
    while time.monotonic() < until:
        if node.get_gcs_client().get_all_node_info(timeout=NODE_LIMIT_S):
            return
        time.sleep(NODE_POLL_S)
