"""Requests of a batch, answered in one process."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types import ErrorResponse, Message
from openai.types import Completion
from openai.types.chat import ChatCompletion

from serve_app.api import batch
from serve_app.api.server import MixtralServer
from serve_app.errors import EngineDead, InternalError
from serve_app.protocol.batch import BatchRequest, BatchResult
from tests.fakes import FakeEngine, server

HELLO = [{"role": "user", "content": "Hello"}]


def answered(given: MixtralServer, *requests: BatchRequest) -> dict[str | None, Any]:
    """Returns the results by `custom_id`."""
    results: list[BatchResult] = []
    asyncio.run(batch.answer_all(given, iter(requests), results.append))
    assert len(results) == len(requests)
    return {result["custom_id"]: result for result in results}


def test_every_generating_route_answers() -> None:
    """Chat and text completions are OpenAI's own objects, with the request's id in them."""
    results = answered(
        server(),
        BatchRequest("chat", "/v1/chat/completions", {"messages": HELLO}),
        BatchRequest("text", "/v1/completions", {"prompt": "Hello"}),
        BatchRequest("plain", "/prompt", {"prompt": "Hello"}),
        BatchRequest("list", "/prompt", {"prompts": ["Hello", ""]}),
    )
    bodies = {name: result["response"]["body"] for name, result in results.items()}
    chat = ChatCompletion.model_validate(bodies["chat"])
    assert chat.choices[0].message.content == "Hello there."
    assert results["chat"]["response"]["request_id"] in chat.id
    assert Completion.model_validate(bodies["text"]).choices[0].text == " Hello there."
    assert bodies["plain"]["text"] == "Hello there."
    assert [sorted(item)[0] for item in bodies["list"]["results"]] == ["finish_reason", "error"]
    assert {result["response"]["status_code"] for result in results.values()} == {200}
    assert len({result["id"] for result in results.values()}) == 4
    assert {result["error"] for result in results.values()} == {None}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "messages"),
        ({"messages": HELLO, "model": "gpt-5"}, 404, "model"),
        ({"messages": HELLO, "stream": True}, 400, "stream"),
    ],
)
def test_an_error_is_an_answer_in_its_place(body: Any, status: int, param: str) -> None:
    """A request that is refused has the status and body that HTTP has; the others are answered."""
    path = "/v1/chat/completions"
    good = BatchRequest("good", path, {"messages": HELLO})
    results = answered(server(), BatchRequest("bad", path, body), good)
    bad = results["bad"]["response"]
    assert (bad["status_code"], bad["body"]["error"]["param"]) == (status, param)
    assert bad["body"]["error"]["request_id"] == bad["request_id"]
    assert results["good"]["response"]["status_code"] == 200


def test_each_api_has_errors_of_its_shape() -> None:
    """An error of a batch on Anthropic's route has Anthropic's form, as over HTTP."""
    body = {"messages": HELLO, "max_tokens": 9}
    requests = [
        BatchRequest("answered", "/v1/messages", body),
        BatchRequest("refused", "/v1/messages", {**body, "max_tokens": 0}),
        BatchRequest("streamed", "/v1/messages", {**body, "stream": True}),
    ]
    bodies = {name: it["response"]["body"] for name, it in answered(server(), *requests).items()}
    assert Message.model_validate(bodies["answered"]).content[0].type == "text"
    for name in ("refused", "streamed"):
        error = ErrorResponse.model_validate(bodies[name])
        assert error.error.type == "invalid_request_error"


def test_the_engine_is_kept_full() -> None:
    """As many requests run at once as the engine takes, and no more than its queue holds."""
    engine = FakeEngine()
    given = server(engine, engine={"max_num_seqs": 32, "max_waiting": 32})
    many = (BatchRequest(str(i), "/v1/completions", {"prompt": "x"}) for i in range(200))
    results = answered(given, *many)
    assert {result["response"]["status_code"] for result in results.values()} == {200}
    assert engine.max_num_seqs == batch.num_under_way(given.settings.engine) == 40


def test_a_dead_engine_ends_the_batch() -> None:
    """It raises, takes no further request and writes no result, so that a second try has them."""
    engine = FakeEngine(error=InternalError("The step failed."))
    given = server(engine, engine={"max_num_seqs": 2, "max_waiting": 0})
    engine.is_alive = False
    taken: list[str] = []
    results: list[BatchResult] = []

    def requests() -> Iterator[BatchRequest]:
        for i in range(100):
            taken.append(str(i))
            yield BatchRequest(str(i), "/v1/completions", {"prompt": "x"})

    with pytest.raises(EngineDead):
        asyncio.run(batch.answer_all(given, requests(), results.append))
    assert len(taken) <= 2
    assert results == []
    assert engine.num_taken == 0


def test_a_failed_request_does_not_end_the_batch() -> None:
    """A 500 of a living engine is a result."""
    engine = FakeEngine(error=InternalError("The step failed."))
    result = answered(server(engine), BatchRequest("a", "/v1/completions", {"prompt": "x"}))["a"]
    assert result["response"]["status_code"] == 500
