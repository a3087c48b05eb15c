"""The three shapes of a job's input, the order they are tried in, and errors for others."""

from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import Call
from serve_app.worker.job import JobRequest, num_prompts, parse

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def parsed(given: Any) -> JobRequest:
    return parse({"id": "job", "input": given}, "req-1", 1000)


@pytest.mark.parametrize(
    ("given", "method", "path", "body"),
    [
        (
            {"openai_route": "/v1/chat/completions", "openai_input": CHAT},
            "POST",
            "/v1/chat/completions",
            CHAT,
        ),
        ({"openai_input": CHAT}, "POST", "/v1/chat/completions", CHAT),
        ({"openai_route": "/v1/models"}, "GET", "/v1/models", None),
        ({"openai_route": "/v1/models", "openai_input": {}}, "GET", "/v1/models", None),
        ({"endpoint": "/prompt", "data": {"prompt": "Hi"}}, "POST", "/prompt", {"prompt": "Hi"}),
        ({"endpoint": "/prompt", "data": {}}, "POST", "/prompt", {}),
        ({"endpoint": "/health"}, "GET", "/health", None),
        ({"endpoint": "/health", "data": {}}, "GET", "/health", None),
        ({"route": "/v1/models/tiny"}, "GET", "/v1/models/tiny", None),
        ({"route": "/v1/models", "method": "delete"}, "DELETE", "/v1/models", None),
        ({"route": "/tokenize", "body": {"prompt": "a"}}, "POST", "/tokenize", {"prompt": "a"}),
        ({"prompt": "Hi", "seed": 1}, "POST", "/prompt", {"prompt": "Hi", "seed": 1}),
        ({"prompts": ["a", "b"]}, "POST", "/prompt", {"prompts": ["a", "b"]}),
        ({"items": [{"prompt": "a"}]}, "POST", "/prompt", {"items": [{"prompt": "a"}]}),
        (
            {"messages": CHAT["messages"], "sampling_params": {"max_tokens": 5}},
            "POST",
            "/prompt",
            {"messages": CHAT["messages"], "max_tokens": 5},
        ),
    ],
)
def test_every_shape_becomes_the_call_it_means(
    given: dict[str, Any], method: str, path: str, body: Any
) -> None:
    """Every documented shape becomes a call of the HTTP route that it names."""
    call = parsed(given).call
    assert call == Call(method, path, body, "req-1", call.arrived)


def test_shapes_are_tried_in_the_documented_order() -> None:
    """The gateway's shape comes before a route, and a route before the plain form."""
    gateway = {"openai_route": "/v1/models", "endpoint": "/prompt", "prompt": "x"}
    assert parsed(gateway).call.path == "/v1/models"
    with pytest.raises(InvalidRequest) as caught:
        parsed({"endpoint": "/health", "prompt": "x"})
    assert caught.value.param == "prompt"


def test_only_the_gateway_gets_sse() -> None:
    """A stream's chunks are SSE text for the gateway and dicts for other shapes."""
    gateway = parsed({"openai_input": {**CHAT, "stream": True}})
    assert (gateway.stream, gateway.sse) == (True, True)
    plain = parsed({"prompt": "x", "stream": True})
    assert (plain.stream, plain.sse) == (True, False)
    whole = parsed({"openai_input": CHAT})
    assert (whole.stream, whole.sse) == (False, False)


@pytest.mark.parametrize(
    ("job", "param"),
    [
        ({}, "input"),
        ({"input": None}, "input"),
        ({"input": {}}, "input"),
        ({"input": []}, "input"),
        ({"input": "hello"}, "input"),
        ({"input": {"temperature": 1}}, "input"),
        ({"input": {"endpoint": "prompt"}}, "endpoint"),
        ({"input": {"endpoint": 3}}, "endpoint"),
        ({"input": {"openai_route": None}}, "openai_route"),
        ({"input": {"route": "/prompt", "method": 1}}, "method"),
        ({"input": {"route": "/prompt", "payload": {}}}, "payload"),
        ({"input": {"prompt": "x", "sampling_params": [1]}}, "sampling_params"),
        ({"input": {"prompt": "x", "seed": 1, "sampling_params": {"seed": 2}}}, "seed"),
    ],
)
def test_anything_else_is_refused_by_name(job: dict[str, Any], param: str) -> None:
    """The error for a null, empty, missing or misshapen input names the field to change."""
    with pytest.raises(InvalidRequest) as caught:
        parse({"id": "job", **job}, "req-1", 1000)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "code"), [("x" * 1000, "request_too_large"), (float("nan"), None)]
)
def test_the_limits_of_an_http_body_hold(prompt: Any, code: str | None) -> None:
    """A body that is too large or holds NaN is refused, as over HTTP."""
    with pytest.raises(InvalidRequest) as caught:
        parsed({"endpoint": "/prompt", "data": {"prompt": prompt}})
    assert caught.value.code == code


def test_text_counts_as_utf8() -> None:
    """A Chinese character counts as its three bytes in UTF-8, not as six of its JSON escape."""
    body = {"prompt": "你" * 300}
    assert parsed({"endpoint": "/prompt", "data": body}).call.body == body


def test_two_names_for_one_thing_are_refused() -> None:
    """A job with two bodies or two routes is refused: one of them would be ignored."""
    with pytest.raises(InvalidRequest, match="same meaning"):
        parsed({"endpoint": "/prompt", "data": {"prompt": "a"}, "body": {"prompt": "b"}})


def test_fields_of_older_workers_change_nothing() -> None:
    """Batch sizes, and values that ask for what happens anyway, are left out of the body."""
    older = {
        "max_batch_size": 50,
        "min_batch_size": 1,
        "batch_size_growth_factor": 3,
        "apply_chat_template": True,
        "refresh_worker": False,
    }
    assert parsed({"prompt": "Hi", **older}).call.body == {"prompt": "Hi"}


@pytest.mark.parametrize("field", ["apply_chat_template", "refresh_worker"])
def test_other_behaviour_of_older_workers_is_refused(field: str) -> None:
    """A value that asks for what older workers did is refused by name, with what to do."""
    with pytest.raises(InvalidRequest, match=f"`{field}` can only be") as caught:
        parsed({"prompt": "Hi", field: field == "refresh_worker"})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"prompt": "x"}, 1),
        ({"prompts": ["a", "b", "c"]}, 3),
        ({"openai_route": "/v1/completions", "openai_input": {"prompt": ["a", "b"], "n": 4}}, 8),
        ({"route": "/v1/completions", "body": {"prompt": [1, 2, 3], "best_of": 5, "n": 2}}, 5),
        ({"openai_input": {**CHAT, "n": True}}, 1),
        ({"openai_input": {**CHAT, "n": "many"}}, 1),
    ],
)
def test_a_job_counts_its_prompts_and_their_answers(given: Any, count: int) -> None:
    """The worker takes jobs by the prompts and the answers to each that they contain."""
    assert num_prompts({"input": given}) == count


def test_only_a_post_can_be_streamed() -> None:
    """The body of a GET is ignored, as over HTTP: an answer that is not streamed is the output."""
    given = {"route": "/v1/models", "method": "GET", "body": {"stream": True}}
    request = parsed(given)
    assert (request.call.method, request.stream, request.is_list) == ("GET", False, False)
