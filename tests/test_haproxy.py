"""`RAY_SERVE_ENABLE_HA_PROXY=1 serve run configs/tiny.yaml`: HAProxy in Serve's proxy's place.

A process of its own, as the switch is read where Ray Serve is imported; on free ports, beside
whatever else runs here.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.test_http import ask_and_leave, check_ids, ended, wait_until_idle
from tools.server_process import free_port, serving

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
}
"""Serve's HAProxy mode. Without the second one, an open replica drains for half a minute."""


def on_free_ports(folder: str) -> dict[str, str]:
    """The variables of HAProxy mode, with ports and files beside whatever else runs here."""
    direct = free_port()
    return HAPROXY | {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(direct),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(direct + 20),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
    }


@pytest.fixture(scope="module")
def haproxys() -> Iterator[str]:
    """HAProxy's folder. Its name is short, because a socket's path has at most 97 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield folder


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, haproxys: str) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("haproxy")
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = port = free_port()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    variables = on_free_ports(haproxys)
    serve = "from ray.serve.scripts import cli; cli()"
    command = [sys.executable, "-c", serve, "run", "--address", "local", "--app-dir", str(ROOT)]
    address = f"http://127.0.0.1:{port}"
    first = {"model": "tiny", "prompt": "Hello", "max_tokens": 1}
    log = folder / "log"
    with serving([*command, str(folder / "tiny.yaml")], variables, address, first, log):
        assert list(Path(haproxys).glob("*/haproxy.cfg")), "Serve's own proxy answers"
        yield address


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(url: str, stream: bool) -> None:
    """HAProxy closes its connection to the replica, which ends the request, streamed or not."""
    with httpx.Client(base_url=url, timeout=60) as http:
        before = ended(http)
        ask_and_leave(http, url, "/v1/completions", stream)
        wait_until_idle(http)
        assert ended(http) - before == {"cancelled": 1}


def test_a_request_has_one_id(url: str) -> None:
    """Headers, error and log of a request have one id, behind HAProxy too."""
    with httpx.Client(base_url=url, timeout=60) as http:
        check_ids(http)
