"""A job's `traceparent`, from its `input` through a deployment handle to the answer's spans."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app.api.server import MixtralServer
from serve_app.errors import InvalidRequest
from serve_app.node.client import DeploymentClient
from serve_app.worker.job import parse
from tests.api.collector import collector
from tests.fakes import FakeEngine, server

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"Traceparent": f"00-{TRACE}-{CLIENT}-01", "x-other": "ignored"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


class Handle:
    """A deployment handle whose replica is `server`, in this process."""

    def __init__(self, server: MixtralServer) -> None:
        self.call, self._server = self, server

    def options(self, **_: object) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> AsyncGenerator[Any, None]:
        return self._server.call(*arguments)


@pytest.mark.parametrize(
    "given",
    [
        {"openai_route": "/v1/chat/completions", "openai_input": CHAT},
        {"endpoint": "/v1/chat/completions", "data": CHAT},
        {"route": "/v1/chat/completions", "body": {**CHAT, "stream": True}},
        {"prompt": "Hi", "sampling_params": {"max_tokens": 5}},
    ],
)
def test_a_job_of_every_shape_continues_the_clients_trace(given: dict[str, Any]) -> None:
    """The answer's span has the client's span as its parent; without `headers` it has none."""

    async def answer(server: MixtralServer, job: dict[str, Any]) -> list[Any]:
        call = parse(job, "r1", 10_000).call
        return [item async for item in DeploymentClient(Handle(server), 60)(call)]

    with collector() as to:
        one = server(FakeEngine("Hello."), observability={"otlp_traces_endpoint": to.url})
        for headers in (HEADERS, None):
            items = asyncio.run(answer(one, {"input": {**given, "headers": headers}}))
            assert "error" not in items[-1]
        one.close()
    wholes = [span for span in to.spans if span.name == "chat tiny"]
    ids = [(span.trace_id.hex(), span.parent_span_id.hex()) for span in wholes]
    assert ids[0] == (TRACE, CLIENT)
    assert ids[1][0] != TRACE
    assert ids[1][1] == ""


@pytest.mark.parametrize("headers", ["traceparent", [], {"traceparent": 1}])
def test_headers_of_another_form_are_refused(headers: Any) -> None:
    """The error for `headers` that are no object of strings names the field."""
    with pytest.raises(InvalidRequest) as caught:
        parse({"input": {"prompt": "Hi", "headers": headers}}, "r1", 10_000)
    assert caught.value.param == "headers"
