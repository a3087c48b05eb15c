"""The spans of answers, as a collector gets them."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as genai
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE

from serve_app.api.server import MixtralServer
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import OutOfMemory, QueueFull
from serve_app.protocol.fields import Sampling
from tests.api.collector import Collector, attributes, collector
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine, items, server

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CHAT = {"messages": [{"role": "user", "content": "zebra crossing"}], "max_tokens": 5}


@pytest.fixture
def to() -> Iterator[Collector]:
    with collector() as it:
        yield it


def traced(fake: FakeEngine, to: Collector) -> MixtralServer:
    return server(fake, observability={"otlp_traces_endpoint": to.url})


def test_an_answer_is_a_trace_of_the_client(running: Endpoint, to: Collector) -> None:
    """The spans continue the client's trace, and say what the answer's usage says."""
    one = MixtralServer(
        Settings(
            model={"name": "tiny", "quantization": "none"},
            observability={"otlp_traces_endpoint": to.url},
        )
    )
    running.server = one
    headers = {"traceparent": f"00-{TRACE}-{CLIENT}-01"}
    try:
        response = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT, headers=headers)
    finally:
        one.close()
    usage = response.json()["usage"]
    spans = {span.name: span for span in to.spans}
    whole = spans.pop("chat tiny")
    assert whole.kind == Span.SPAN_KIND_SERVER
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, CLIENT)
    found = attributes(whole)
    assert found[genai.GEN_AI_USAGE_INPUT_TOKENS] == usage["prompt_tokens"]
    assert found[genai.GEN_AI_USAGE_OUTPUT_TOKENS] == usage["completion_tokens"]
    assert found[genai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS] == 0
    assert found[genai.GEN_AI_RESPONSE_FINISH_REASONS] == [
        response.json()["choices"][0]["finish_reason"]
    ]
    assert found[genai.GEN_AI_OPERATION_NAME] == genai.GenAiOperationNameValues.CHAT.value
    assert found[genai.GEN_AI_REQUEST_MODEL] == found[genai.GEN_AI_RESPONSE_MODEL] == "tiny"
    assert found[genai.GEN_AI_REQUEST_MAX_TOKENS] == 5
    assert found["mixtral.request_id"] == response.headers["x-mixtral-request-id"]
    assert {name for name in found if name.startswith("gen_ai")} <= {
        value for value in vars(genai).values() if isinstance(value, str)
    }
    assert list(spans) == ["queue", "prefill", "decode"]
    assert {span.parent_span_id for span in spans.values()} == {whole.span_id}
    queue, prefill, decode = spans.values()
    assert whole.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano == whole.end_time_unix_nano
    lengths = [it.end_time_unix_nano - it.start_time_unix_nano for it in spans.values()]
    assert all(length > 0 for length in lengths)
    (resource,) = {attributes(it.resource)["service.name"] for it in to.resources}
    assert resource == "mixtral-serve"
    assert not any(b"zebra" in body for body in to.received)


@pytest.mark.parametrize(
    ("fake", "code", "names"),
    [
        (FakeEngine(error=OutOfMemory("zebra")), "out_of_memory", {"queue", "prefill", "decode"}),
        (FakeEngine("", error=QueueFull("zebra", retry_after_s=1)), "queue_full", set()),
        (FakeEngine("", error=RuntimeError("zebra")), "internal_error", set()),
    ],
)
def test_a_failure_has_its_code_and_no_text(
    fake: FakeEngine, code: str, names: set[str], to: Collector
) -> None:
    """The span of a failed answer has the code that clients get; before a token it stands alone."""
    one = traced(fake, to)
    asyncio.run(items(one, "/v1/completions", {"prompt": "zebra"}))
    one.close()
    spans = {span.name: span for span in to.spans}
    whole = spans.pop("text_completion tiny")
    assert set(spans) == names
    assert whole.status.code == Status.STATUS_CODE_ERROR
    assert whole.parent_span_id == b""
    assert attributes(whole)[ERROR_TYPE] == code
    assert not any(b"zebra" in body for body in to.received)


def test_a_client_that_leaves_is_no_error(to: Collector) -> None:
    """The answer ends as cancelled, with the tokens that it had."""
    one = traced(FakeEngine(is_endless=True), to)

    async def leave() -> None:
        body = {"prompt": "a", "stream": True, "max_tokens": 500}
        call: AsyncGenerator[Any, None] = one.call("POST", "/prompt", body, "r1")
        await anext(call)
        await anext(call)
        await call.aclose()

    asyncio.run(leave())
    one.close()
    (whole,) = (span for span in to.spans if span.name == "chat tiny")
    assert attributes(whole)[genai.GEN_AI_RESPONSE_FINISH_REASONS] == ["cancelled"]
    assert attributes(whole)[genai.GEN_AI_USAGE_OUTPUT_TOKENS] > 0
    assert whole.status.code == Status.STATUS_CODE_UNSET


def test_each_answer_has_its_own_spans(to: Collector) -> None:
    """A list of prompts is one request with a trace for each prompt."""
    one = traced(FakeEngine("Hello there."), to)
    asyncio.run(items(one, "/prompt", {"prompts": ["a", "b"]}))
    one.close()
    wholes = [span for span in to.spans if span.name == "chat tiny"]
    assert len(wholes) == 2
    assert len({attributes(it)["mixtral.request_id"] for it in wholes}) == 1


def test_a_client_decides_what_is_recorded(running: Endpoint, to: Collector) -> None:
    """A client's trace that is not sampled has no span; one without a valid header is new."""
    running.server = one = traced(FakeEngine("Hello there."), to)
    for given in (f"00-{TRACE}-{CLIENT}-00", "zebra"):
        headers = {"traceparent": given}
        httpx.post(f"{running.url}/prompt", json={"prompt": "a"}, headers=headers)
    one.close()
    (whole,) = (span for span in to.spans if span.name == "chat tiny")
    assert whole.trace_id.hex() != TRACE
    assert whole.parent_span_id == b""


def test_without_the_setting_nothing_is_traced() -> None:
    """Answers have no trace by default."""
    one = server()

    async def trace() -> object:
        from serve_app.protocol.call import Call

        call = Call("POST", "/prompt", {}, "r1")
        (answer,) = await one.inputs.answers(call, Sampling(), [1], "prompt")
        return answer.trace

    assert one.tracing is None
    assert asyncio.run(trace()) is None


def test_an_address_of_grpc_is_refused() -> None:
    """vLLM's users may have one, which OTLP over HTTP cannot reach."""
    with pytest.raises(ConfigError, match="http"):
        Settings.from_args({"observability": {"otlp_traces_endpoint": "grpc://a:4317"}}, "x")
