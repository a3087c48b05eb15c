"""What `benchmarks.cluster` counts: how requests end, and how equal replicas' loads are."""

import threading
from http.server import BaseHTTPRequestHandler

from benchmarks.cluster_clients import WHOLE, Clients, failures
from benchmarks.cluster_server import loads
from tests.node.test_haproxy_program import QuietServer
from tests.worker.conftest import until

EVENT = b"data: {}\n\n"
END = b"data: [DONE]\n\n"


class Answers(BaseHTTPRequestHandler):
    """Answers a whole stream, half of one, an error, half a response, and so on."""

    protocol_version = "HTTP/1.1"
    number = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        kind, type(self).number = self.number % 4, self.number + 1
        if kind == 2:
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        body = EVENT if kind == 1 else EVENT + END
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body) + (kind == 3)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = kind == 3

    def log_message(self, *_: object) -> None: ...


def test_each_request_counts_by_how_it_ends() -> None:
    """A stream without its end, an error's status and a broken connection are failures."""
    with QuietServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        with Clients(server.server_port, 1, 8, keeps=False) as clients:
            until(lambda: len(clients.sent) >= 4)
        server.shutdown()
    first = clients.sent[:4]
    assert first[0].result == WHOLE
    assert failures(first) == {"cut": 1, "503": 1, "IncompleteReadError": 1}
    found = clients.between(first[0].began, first[3].ended)
    assert found["tokens_per_s"] > 0
    assert found["failed"] == failures(first)


def test_the_spread_is_the_busiest_replica_beside_the_least_busy_one() -> None:
    """110 and 100 tokens are 10 % apart; a replica without tokens has no such number."""
    assert loads({1: 5.0}, {1: 115.0, 2: 100.0}) == {"tokens": [100.0, 110.0], "spread": 0.1}
    assert loads({}, {1: 10.0, 2: 0.0})["spread"] is None
