"""`/v1/responses`, with OpenAI's own client and models."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from serve_app.errors import OutOfMemory, QueueFull
from tests.api.conftest import Endpoint
from tests.api.named_events import events_of
from tests.fakes import FakeEngine
from tests.validated import validated

PATH = "/v1/responses"
QUESTION = "What is 2 + 3?"
ASKED: Any = {"model": "tiny", "input": QUESTION}
GREEDY: Any = {**ASKED, "temperature": 0, "max_output_tokens": 16}


def test_the_client_gets_the_same_response_whole_and_streamed(tiny_endpoint: Endpoint) -> None:
    """The tiny model's answer with its usage, from `create` and from the stream helper."""
    with tiny_endpoint.client() as client:
        whole = client.responses.create(**GREEDY)
        with client.responses.stream(**GREEDY) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            streamed = stream.get_final_response()
    assert whole.output_text == streamed.output_text == text != ""
    assert whole.usage == streamed.usage
    assert whole.usage is not None
    assert whole.usage.output_tokens > 0
    assert (whole.status, streamed.status) == ("completed", "completed")
    assert whole.id.startswith("resp_")


def test_a_response_is_one_of_openais_models(http: httpx.Client) -> None:
    """No field is missing and none is unknown; the request's fields are returned."""
    given = {"instructions": "Be brief.", "metadata": {"a": "b"}, "top_p": 0.5}
    response: Response = validated(Response, http.post(PATH, json={**ASKED, **given}).json())
    assert response.output_text == "Hello there."
    assert {name: getattr(response, name) for name in given} == given


def test_vllms_ignore_eos_passes(http: httpx.Client, endpoint: Endpoint) -> None:
    """Load generators send it, so that all answers have the same length."""
    engine = endpoint.serve()
    assert http.post(PATH, json={**ASKED, "ignore_eos": True, "stop": None}).status_code == 200
    assert http.post(PATH, json=ASKED).status_code == 200
    assert [params.ignore_eos for _, params in engine.requests] == [True, False]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("text", ["Hello there.", ""])
def test_events_are_openais_models_in_order(
    endpoint: Endpoint, http: httpx.Client, text: str, size: int
) -> None:
    """The events validate, are numbered, come in the protocol's order, and end with the response
    that the same request without a stream gets."""
    endpoint.serve(FakeEngine(text, size=size))
    whole = http.post(PATH, json=ASKED).json()
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    for number, event in enumerate(events):
        validated(ResponseStreamEvent, event)
        assert event["sequence_number"] == number
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1]["response"]
    own = ("id", "created_at")
    items = [{**item, "id": None} for item in whole["output"]]
    assert [{**item, "id": None} for item in last["output"]] == items
    assert {**last, "output": None} | dict.fromkeys(own) == {**whole, "output": None} | (
        dict.fromkeys(own)
    )
    assert [e["item"] for e in events if e["type"] == "response.output_item.done"] == (
        last["output"]
    )


def test_the_limit_is_max_output_tokens(tiny_endpoint: Endpoint) -> None:
    """A response that is cut says why, whole and streamed."""
    with tiny_endpoint.client() as client:
        whole = client.responses.create(**{**GREEDY, "max_output_tokens": 1})
        last = list(client.responses.create(**{**GREEDY, "max_output_tokens": 1}, stream=True))[-1]
    assert last.type == "response.incomplete"
    for response in (whole, last.response):
        assert response.status == response.output[0].status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"


LOGPROBS: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 3}


def test_log_probabilities_are_those_of_chat(tiny_endpoint: Endpoint) -> None:
    """Tokens, candidates and numbers are those of chat's `logprobs`, whole and streamed."""
    with tiny_endpoint.client() as client:
        whole = client.responses.create(**GREEDY, **LOGPROBS)
        deltas = list[Any]()
        with client.responses.stream(**GREEDY, **LOGPROBS) as stream:
            for event in stream:
                if event.type == "response.output_text.delta":
                    deltas += event.logprobs
            streamed = stream.get_final_response()
        chat = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=16,
            logprobs=True,
            top_logprobs=3,
        )
    assert chat.choices[0].logprobs is not None
    expected = [each.model_dump() for each in chat.choices[0].logprobs.content or []]
    assert len(expected) > 1
    assert {len(each["top_logprobs"]) for each in expected} == {3}
    for response in (whole, streamed):
        content: Any = response.output[0]
        assert [each.model_dump() for each in content.content[0].logprobs] == expected
    for each in expected:
        del each["bytes"]
        for top in each["top_logprobs"]:
            del top["bytes"]
    assert [each.model_dump() for each in deltas] == expected


def test_many_log_probabilities_of_a_stream_are_refused(http: httpx.Client) -> None:
    """The last events have all of them again, so a stream has fewer than a whole answer."""
    body = {**ASKED, **LOGPROBS, "top_logprobs": 20, "max_output_tokens": 10_001}
    refused = http.post(PATH, json={**body, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "top_logprobs")
    assert "200,000 are allowed" in refused.json()["error"]["message"]


def test_items_make_the_prompt_of_chat(endpoint: Endpoint, http: httpx.Client) -> None:
    """The prompt's token ids are those of the same conversation in chat."""
    engine = endpoint.serve()
    items = [
        {"role": "developer", "content": "Use English."},
        {"role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "1", "annotations": [], "logprobs": []}],
        },
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "Two"},
                {"type": "input_text", "text": "Three"},
            ],
        },
    ]
    body = {**ASKED, "input": items, "instructions": "Be brief."}
    usage = http.post(PATH, json=body).json()["usage"]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Use English."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two\nThree"},
    ]
    http.post("/v1/chat/completions", json={"messages": chat})
    (one, _), (other, _) = engine.requests
    assert one == other
    assert usage["input_tokens"] == len(one)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_a_response_can_be_sent_back_as_input(endpoint: Endpoint) -> None:
    """The client's loop: the output's items, as the client dumps them, and another question."""
    engine = endpoint.serve()
    with endpoint.client() as client:
        first = client.responses.create(**ASKED)
        items: Any = [
            {"role": "user", "content": QUESTION},
            *[item.model_dump() for item in first.output],
            {"role": "user", "content": "And?"},
        ]
        client.responses.create(model="tiny", input=items)
        chat: Any = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "And?"},
        ]
        client.chat.completions.create(model="tiny", messages=chat)
    (_, (one, _), (other, _)) = engine.requests
    assert one == other


def test_sampling_fields_reach_the_engine(endpoint: Endpoint, http: httpx.Client) -> None:
    """The fields mean what chat's mean."""
    engine = endpoint.serve()
    http.post(PATH, json={**ASKED, "temperature": 0.5, "top_p": 0.9, "max_output_tokens": 9})
    chat = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 9}
    http.post("/v1/chat/completions", json={**chat, "temperature": 0.5, "top_p": 0.9})
    (_, one), (_, other) = engine.requests
    assert (one.temperature, one.top_p, one.max_tokens) == (0.5, 0.9, 9)
    assert (other.temperature, other.top_p, other.max_tokens) == (0.5, 0.9, 9)


class Sum(BaseModel):
    total: int


def test_the_client_parses_a_response(tiny_endpoint: Endpoint) -> None:
    """`responses.parse` sends a JSON schema, which the answer follows; so does `json_object`."""
    with tiny_endpoint.client() as client:
        parsed = client.responses.parse(**GREEDY, text_format=Sum)
        free = client.responses.create(
            **{**GREEDY, "max_output_tokens": 200}, text={"format": {"type": "json_object"}}
        )
    assert isinstance(parsed.output_parsed, Sum)
    assert free.status == "incomplete" or isinstance(json.loads(free.output_text), dict)


# What Vercel's AI SDK and openai-agents send by default, and all that a null means.
AGENTS: Any = {"include": [], "tools": [], "parallel_tool_calls": None, "store": None}
AI_SDK: Any = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}


@pytest.mark.parametrize(
    "fields",
    [
        AGENTS,
        AI_SDK,
        {"store": False, "truncation": "disabled", "parallel_tool_calls": False},
        {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "low"}},
        {"user": "u", "service_tier": "auto", "prompt_cache_key": "k", "max_tool_calls": 3},
        {"text": {"verbosity": "medium"}, "tool_choice": "auto", "background": False},
        {"text": {"format": None}, "temperature": None, "metadata": None},
        {"text": {"format": {"type": "text"}}, "previous_response_id": None, "top_logprobs": 0},
        {"stream_options": {"include_obfuscation": False}, "safety_identifier": "s"},
    ],
)
def test_what_changes_nothing_passes(http: httpx.Client, fields: Any) -> None:
    """Defaults of clients, fields of the documented list, and what happens anyway."""
    response = http.post(PATH, json={**ASKED, **fields})
    assert response.status_code == 200, response.text
    validated(Response, response.json())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"input": None}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "system", "content": "x"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
        ),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"colour": 1}, "colour"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    http: httpx.Client, fields: Any, param: str
) -> None:
    """A 400 in OpenAI's shape names the field."""
    response = http.post(PATH, json={**ASKED, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("stream", [False, True])
def test_early_errors_keep_their_status(endpoint: Endpoint, stream: bool) -> None:
    """Before the first token a failure is a status, also for a stream."""
    endpoint.serve(FakeEngine("", error=QueueFull("Full.", retry_after_s=7)))
    with endpoint.client() as client, pytest.raises(openai.RateLimitError) as raised:
        client.responses.create(**ASKED, stream=stream)
    assert raised.value.response.headers["retry-after"] == "7"


def test_a_failure_in_a_stream_is_a_failed_response(endpoint: Endpoint, http: httpx.Client) -> None:
    """The response fails with the error; then comes OpenAI's event `error`, which the client
    raises."""
    endpoint.serve(FakeEngine(error=OutOfMemory("No memory.")))
    seen: list[Any] = []
    with endpoint.client() as client:
        stream = client.responses.create(**ASKED, stream=True)
        with pytest.raises(openai.APIError, match="No memory"):
            seen.extend(stream)
    last: Any = validated(ResponseStreamEvent, seen[-1].to_dict())
    assert last.type == "response.failed"
    assert (last.response.error.code, last.response.error.message) == ("server_error", "No memory.")
    assert endpoint.server.metrics.finished["error"] == 1
    events = events_of(http.post(PATH, json={**ASKED, "stream": True}))
    error: Any = events[-1].pop("error")
    validated(ResponseStreamEvent, events[-1])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (error["message"], events[-1]["message"]) == ("No memory.", "No memory.")
    assert (error["code"], events[-1]["code"]) == ("out_of_memory", "out_of_memory")


def test_leaving_a_stream_frees_the_engine(endpoint: Endpoint, http: httpx.Client) -> None:
    """When the client closes the connection, the request ends."""
    engine = endpoint.serve(FakeEngine(is_endless=True))
    body = {**ASKED, "stream": True, "max_output_tokens": 500}
    with http.stream("POST", PATH, json=body) as response:
        received = response.iter_bytes()  # kept: an iterator that is collected closes the response
        next(received)
        assert engine.num_running == 1
    assert engine.left.wait(10)
    assert engine.num_running == 0
