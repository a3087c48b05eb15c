"""`mixtral-serve run`: HAProxy takes the requests, and hands them to the replica."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from serve_app.machine.ports import free_port
from tests.api.test_http_1_0 import old_client
from tests.cli.test_commands import COMMAND, on_port, served
from tests.environment import bare
from tests.listening import listening, open_to_strangers
from tests.ports import undocumented
from tests.processes import descendants, replica_of
from tests.settled import left_behind
from tests.test_http import ask_and_leave, check_ids, ended, running, wait_until_idle
from tests.worker.conftest import until

pytestmark = pytest.mark.ray

Run = tuple["subprocess.Popen[bytes]", str]
"""The process of `mixtral-serve run`, and its URL."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with served(tmp_path_factory.mktemp("run")) as run:
        yield run


def haproxys(pid: int) -> dict[int, str]:
    """Returns pid and command line of each HAProxy below `pid`."""
    return {child: line for child, line in descendants(pid).items() if "haproxy.cfg" in line}


def test_files_are_for_this_user_alone(run: Run) -> None:
    """The folders of HAProxy and of Ray's session have mode 0700."""
    process, _ = run
    (line,) = haproxys(process.pid).values()
    found = re.search(r"-f (/tmp/mixtral-[^/]+)/", line)
    assert found, line
    (session,) = Path("/tmp/ray").glob(f"session_*_{process.pid}")
    for folder in (Path(found[1]), session, session / "sockets"):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_no_other_program_goes_before_the_server(run: Run) -> None:
    """The replica and HAProxy have the priority with which the server was started."""
    process, _ = run
    (proxy,) = haproxys(process.pid)
    nice = {psutil.Process(pid).nice() for pid in (process.pid, replica_of(process.pid), proxy)}
    assert len(nice) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(run: Run, stream: bool) -> None:
    """HAProxy closes its connection to the replica, which ends the request, streamed or not."""
    _, url = run
    with httpx.Client(base_url=url, timeout=60) as http:
        before = ended(http)
        ask_and_leave(http, url, "/v1/completions", stream)
        wait_until_idle(http)
        assert ended(http) - before == {"cancelled": 1}


def test_a_stream_for_http_1_0_has_no_chunks(run: Run) -> None:
    """HAProxy does not add the encoding again, and ends the connection after the last event."""
    _, url = run
    head, events = old_client(url, "/prompt", {"prompt": "Hi", "max_tokens": 3, "stream": True})
    assert head.startswith("http/1.0 200")
    assert "transfer-encoding" not in head
    assert events.startswith(b'data: {"token"')
    assert events.endswith(b"data: [DONE]\n\n")


def test_the_pages_are_there(run: Run) -> None:
    """HAProxy passes the page, its policy and the description on."""
    _, url = run
    page = httpx.get(f"{url}/")
    assert page.text.startswith("<!doctype html>")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "/prompt" in httpx.get(f"{url}/openapi.json").json()["paths"]


def test_a_request_has_one_id(run: Run) -> None:
    """Headers, error and log of a request have one id, behind HAProxy too."""
    with httpx.Client(base_url=run[1], timeout=60) as http:
        check_ids(http)


def test_no_port_takes_calls_from_other_machines(run: Run) -> None:
    """Serve's and HAProxy's ports are on loopback; Ray's refuse each call without the token."""
    process, url = run
    found = listening(process.pid)
    assert url.endswith(str(next(port for it, _, port in found if it.name() == "haproxy")))
    assert {it.name().partition(":mixtral")[0] for it, _, _ in found} >= {
        "gcs_server",
        "raylet",
        "ray::ServeReplica",
    }
    assert open_to_strangers(process.pid) == []


def test_headers_for_serve_have_no_effect(run: Run) -> None:
    """A byte that is not UTF-8 is no 500, and a client cannot keep its request alive."""
    _, url = run
    for name in (b"x-session-id", b"serve_multiplexed_model_id", b"x-request-timeout-seconds"):
        assert httpx.get(f"{url}/ping", headers=[(name, b"\xff")]).status_code == 200
    for value in (b"\xff", b"a" * 1000):
        assert httpx.get(f"{url}/ping", headers=[(b"x-request-id", value)]).status_code == 400
    with httpx.Client(base_url=url, timeout=60) as http:
        ask_and_leave(http, url, "/prompt", False, "X-Request-Disconnect-Disabled: ?1\r\n")
        wait_until_idle(http)


def test_half_sent_requests_do_not_block_others(run: Run) -> None:
    """Beside 400 half-sent bodies for a status route, and then for one that generates, others are
    answered at once."""
    _, url = run
    port = int(url.rpartition(":")[2])
    half = "POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"
    body = {"prompt": "a", "max_tokens": 1}
    with ExitStack() as stack:
        for path in ("/ping", "/prompt"):
            for _ in range(400):
                opened = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                opened.sendall((half % path).encode())
            assert httpx.get(f"{url}/ping").status_code == 200
            assert httpx.post(f"{url}/prompt", json=body, timeout=60).status_code == 200


def test_two_servers_run_on_one_machine(run: Run, tmp_path: Path) -> None:
    """The second one answers itself, and each of its ports is where docs/security.md says, with the
    guard that it says; after Ctrl-C no process of it lives, and the first does."""
    with served(tmp_path, API_KEYS="k" * 16) as (second, url):
        assert httpx.get(f"{url}/ping").status_code == 200
        assert undocumented(second.pid, "`mixtral-serve run`") == set()
        # One that Serve has replaced ends a moment later.
        until(lambda: len(haproxys(second.pid)) == 1)
        folder = re.search(r"-f (/tmp/mixtral-[^/]+)/", "".join(haproxys(second.pid).values()))
        second.send_signal(signal.SIGINT)
        assert second.wait(60) == 0
        assert not left_behind(tmp_path)
        assert folder
        assert not Path(folder[1]).exists()
    assert httpx.get(f"{run[1]}/ping").status_code == 200


def test_a_replica_that_dies_is_a_503(run: Run) -> None:
    """The waiting client gets the error of our table, and the server answers again."""
    process, url = run
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": 12_000}
    with httpx.Client(base_url=url, timeout=60) as http:
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(http.post, "/prompt", json=body)
            until(lambda: running(http)[0] == 1)
            os.kill(replica_of(process.pid), signal.SIGKILL)
            response = asked.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    until(lambda: httpx.get(f"{url}/ping", timeout=60).status_code == 200, 60)


@pytest.mark.faults
def test_one_ready_replica_is_enough(tmp_path: Path) -> None:
    """A server for other machines answers while its second replica cannot start, for want of a
    second machine; SIGTERM lets a stream finish."""
    port = free_port()
    document = yaml.safe_load(on_port(port))
    document["http_options"]["host"] = "0.0.0.0"
    two = {"name": "mixtral", "num_replicas": 2, "max_replicas_per_node": 1}
    document["applications"][0]["deployments"] = [two | {"ray_actor_options": {"num_cpus": 0.1}}]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document))
    command = [*COMMAND, "run", "tiny.yaml"]
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": 2000, "stream": True}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=bare(tmp_path), stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        try:
            until(lambda: process.poll() is not None or is_ready(http), 100)
            assert "1 of 2 replicas are ready." in (tmp_path / "log").read_text()
            with http.stream("POST", "/prompt", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            assert process.wait(60) == 0
        finally:
            process.kill()
    until(lambda: not left_behind(tmp_path))


def is_ready(http: httpx.Client) -> bool:
    """Returns whether `/ping` is 200. Until a replica is ready, the server closes connections."""
    try:
        return http.get("/ping").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.faults
def test_nothing_lives_after_kill_9(tmp_path: Path) -> None:
    """HAProxy ends with the server, and the port is free."""
    with served(tmp_path) as (process, url):
        assert haproxys(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        until(lambda: not left_behind(tmp_path))
    socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))).close()
