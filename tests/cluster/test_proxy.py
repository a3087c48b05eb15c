"""cluster/proxy: nginx and Caddy, started with the examples, stream over TLS."""

import os
import re
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from serve_app.config.api_settings import ApiSettings
from serve_app.machine.ports import free_port
from tests.worker.conftest import until

PROXY = Path("cluster/proxy")
OPENSSL = shutil.which("openssl")


class Upstream(ThreadingHTTPServer):
    """Streams one event, and the second one when the test has read the first."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.was_read = threading.Event()
        self.client_left = threading.Event()
        self.headers: dict[str, str] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self.server.headers = {name.lower(): value for name, value in self.headers.items()}
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.event(b"data: first\n\n")
        if self.path == "/endless":
            self.connection.settimeout(30)
            if self.connection.recv(1) == b"":
                self.server.client_left.set()
            self.close_connection = True
            return
        assert self.server.was_read.wait(30)
        self.event(b"data: second\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    if OPENSSL is None:
        pytest.skip("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def nginx(folder: Path, port: int, server: int, pair: tuple[Path, Path]) -> list[str]:
    """Returns the example with a certificate and ports of the test, in the smallest nginx.conf."""
    cert, key = pair
    text = (PROXY / "nginx.conf").read_text()
    for old, new in (
        ("127.0.0.1:8000", f"127.0.0.1:{server}"),
        ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/letsencrypt/live/llm.example.com/fullchain.pem", str(cert)),
        ("/etc/letsencrypt/live/llm.example.com/privkey.pem", str(key)),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        # Its workers write large bodies into this folder, which is for this user alone.
        f"{'user root;' if os.getuid() == 0 else ''}\n"
        f"daemon off; pid {folder}/pid; error_log stderr;\nevents {{}}\n"
        f"http {{ access_log off;\n{temporary}{text}}}\n"
    )
    return ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def caddy(folder: Path, port: int, server: int, pair: tuple[Path, Path]) -> list[str]:
    """Returns the example with a certificate and ports of the test."""
    cert, key = pair
    text = (PROXY / "Caddyfile").read_text()
    for old, new in (
        ("127.0.0.1:8000", f"127.0.0.1:{server}"),
        ("llm.example.com {", f"https://localhost:{port} {{\n\ttls {cert} {key}"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    if version() < (2, 6, 3):
        text = text.replace("request_buffers 10MB", "buffer_requests")
    options = "{\n\tadmin off\n\tauto_https disable_redirects\n}\n"
    (folder / "Caddyfile").write_text(options + text)
    return ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


def version() -> tuple[int, ...]:
    """Returns the version of the installed Caddy."""
    done = subprocess.run(["caddy", "version"], capture_output=True, text=True, check=True)
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", done.stdout)
    assert found, done.stdout
    return tuple(map(int, found.groups()))


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
def client(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    upstream: Upstream,
    certificate: tuple[Path, Path],
) -> Iterator[httpx.Client]:
    """A client of the proxy, which trusts its certificate alone."""
    if shutil.which(request.param.__name__) is None:
        pytest.skip(f"{request.param.__name__} is not installed")
    port = free_port()
    command = request.param(tmp_path, port, upstream.server_address[1], certificate)
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with proxy(command, tmp_path) as process:
        with httpx.Client(
            base_url=f"https://localhost:{port}", verify=context, timeout=30
        ) as client:
            until(lambda: process.poll() is not None or is_up(client), 30)
            assert process.poll() is None, (tmp_path / "log").read_text()
            yield client


@contextmanager
def proxy(command: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/bin", "HOME": str(folder)}
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process,
    ):
        yield process
        process.terminate()


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/metrics").status_code == 404
    except httpx.TransportError:
        return False


def test_events_come_one_by_one(client: httpx.Client, upstream: Upstream) -> None:
    """The first event arrives before the server has sent the second; the key passes."""
    headers = {"Authorization": "Bearer key"}
    with client.stream("POST", "/prompt", content=b"{}", headers=headers) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: first"
        upstream.was_read.set()
        assert [line for line in lines if line] == ["data: second"]
    assert upstream.headers["authorization"] == "Bearer key"
    assert upstream.headers["x-forwarded-proto"] == "https"


def test_a_client_that_leaves_ends_its_request(client: httpx.Client, upstream: Upstream) -> None:
    """The proxy closes its connection to the server, which frees the request's memory."""
    with client.stream("POST", "/endless", content=b"{}") as response:
        assert next(response.iter_lines()) == "data: first"
    client.close()
    assert upstream.client_left.wait(30)


@pytest.mark.parametrize("path", ["/metrics", "/health"])
def test_what_needs_no_key_stays_inside(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_largest_body_passes(client: httpx.Client, upstream: Upstream) -> None:
    """The proxy has no smaller limit than the server."""
    upstream.was_read.set()
    body = b"a" * ApiSettings().max_body_bytes
    assert client.post("/prompt", content=body).text == "data: first\n\ndata: second\n\n"


def test_an_answer_that_comes_at_once_is_whole(client: httpx.Client, upstream: Upstream) -> None:
    """A server may answer as soon as it has the body. Go closes a body that is still being sent
    when the answer begins (golang/go#40747), so Caddy would cut some of these answers."""
    upstream.was_read.set()
    for size in (2, 1_000_000) * 20:
        answer = client.post("/prompt", content=b"a" * size).text
        assert answer == "data: first\n\ndata: second\n\n"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("nginx.conf", "proxy_read_timeout {}s;"), ("Caddyfile", "response_header_timeout {}s ")],
)
def test_the_proxy_waits_longer_than_a_request_takes(name: str, pattern: str) -> None:
    timeout_s = int(ApiSettings().request_timeout_s) + 10
    assert pattern.format(timeout_s) in (PROXY / name).read_text()
