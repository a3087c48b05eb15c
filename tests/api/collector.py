"""An OpenTelemetry collector on loopback that keeps the spans it gets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Collector:
    """`url` takes OTLP over HTTP; `spans` are those of all requests, by name."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1/traces"
        self.received: list[bytes] = []

    @property
    def resources(self) -> list[Any]:
        return [
            resource
            for body in self.received
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        ]

    @property
    def spans(self) -> list[Any]:
        return [
            span
            for resource in self.resources
            for scope in resource.scope_spans
            for span in scope.spans
        ]


def attributes(it: Any) -> dict[str, Any]:
    """Returns the attributes of a span or a resource as Python values."""

    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        found = getattr(value, kind)
        return [plain(each) for each in found.values] if kind == "array_value" else found

    return {each.key: plain(each.value) for each in it.attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """Yields a running collector."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            it.received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        it = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield it
        server.shutdown()
        thread.join()
