"""How Ray starts its head node in this process: without what one machine has no use for.

What `ray.init` of 2.60 does that nobody here asks for:

    API server    started for its usage statistics even where there is no dashboard; a Python
                  process of 2 s that `ray.init` waits for, asking ten times a second
    autoscaler    another process, which looks after machines that are not there
    node          whether it is known is asked once a second
    Serve         whether the application runs is asked once a second

So the first two are left out, and the others are asked more often; while the node comes up, this
process imports Serve. Reaches into `ray._private`: tests/test_contract.py holds what is used.
"""

import time
from typing import Any

NODE_POLL_S = 0.02
"""Seconds between two checks of whether Ray's GCS knows the node."""
NODE_LIMIT_S = 10.0
"""Seconds after which Ray's own wait has the last word."""
APP_POLL_S = 0.1
"""Seconds between two checks of whether the application runs; Serve's controller polls as often."""


def shorten() -> None:
    """From now on, Ray and Serve start so in this process."""
    from ray._private.node import Node

    if Node.start_api_server is _no_api_server:
        return
    Node.start_api_server = _no_api_server
    Node.start_monitor = _no_monitor
    start_processes = Node.start_ray_processes

    def start_and_meet(node: Any) -> None:
        start_processes(node)
        _import_serve()
        _wait_until_known(node)

    Node.start_ray_processes = start_and_meet


def _no_api_server(node: Any, *, include_dashboard: Any, raise_on_failure: bool) -> None:
    node._webui_url = ""  # as Ray has it without a dashboard


def _no_monitor(node: Any) -> None: ...


def _import_serve() -> None:
    from ray.serve._private import client

    client.CLIENT_POLLING_INTERVAL_S = APP_POLL_S


def _wait_until_known(node: Any) -> None:
    until = time.monotonic() + NODE_LIMIT_S
    while time.monotonic() < until:
        if node.get_gcs_client().get_all_node_info(timeout=NODE_LIMIT_S):
            return
        time.sleep(NODE_POLL_S)
