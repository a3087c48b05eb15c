"""Every route's answers and refusals. The engine is a fake."""

import asyncio
import json
import sys
from typing import Any

import pytest
from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.errors import EngineDead
from tests.fakes import MAX_MODEL_LEN, FakeEngine, answer, chunks, items, server, tokenizer

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}
EURO = "It is 5 €, 你好 🙂 ok."


def ask(path: str, body: Any, engine: FakeEngine | None = None, **args: Any) -> dict[str, Any]:
    """Returns the answer of a server made for this one request."""
    return asyncio.run(answer(server(engine, **args), path, body))


def stream(path: str, body: Any, engine: FakeEngine | None = None) -> list[dict[str, Any]]:
    """Returns the chunks of a server made for this one request."""
    return asyncio.run(chunks(server(engine), path, body))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_chat_answer_is_openais(size: int) -> None:
    """Whole and streamed answers are OpenAI's objects with equal text for any delta size."""
    body = {**CHAT, "logprobs": True, "top_logprobs": 2}
    whole = ChatCompletion.model_validate(
        ask("/v1/chat/completions", body, FakeEngine(EURO)), strict=True
    )
    parts = [
        ChatCompletionChunk.model_validate(chunk, strict=True)
        for chunk in stream("/v1/chat/completions", body, FakeEngine(EURO, size=size))
    ]
    first, last = parts[0].choices[0], parts[-1].choices[0]
    assert whole.choices[0].message.content == EURO
    assert "".join(part.choices[0].delta.content or "" for part in parts) == EURO
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert [part.choices[0].delta.role for part in parts[1:]] == [None] * (len(parts) - 1)
    assert last.finish_reason == whole.choices[0].finish_reason == "stop"
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    scores = [part.choices[0].logprobs for part in parts]
    joined = [token for score in scores if score for token in score.content or []]
    assert whole.choices[0].logprobs is not None
    assert joined == whole.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes or []) for token in joined).decode().strip() == EURO
    assert all(len(token.top_logprobs) == 2 for token in joined)
    json.dumps([token.model_dump() for token in joined], allow_nan=False)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 8}),
        ("/v1/completions", {"prompt": ["Hello", "Good day"], "max_tokens": 8}),
    ],
    ids=["chat", "completion", "two completions"],
)
def test_usage_comes_last_and_only_where_asked(path: str, body: Any) -> None:
    """include_usage adds one chunk without choices, and a null usage to those before it."""
    asked = stream(path, {**body, "stream_options": {"include_usage": True}})
    whole = ask(path, body)
    CompletionUsage.model_validate(whole["usage"], strict=True)
    assert (asked[-1]["choices"], asked[-1]["usage"]) == ([], whole["usage"])
    assert {chunk["usage"] for chunk in asked[:-1]} == {None}
    assert not any("usage" in chunk for chunk in stream(path, body))


def test_usage_counts_tokens() -> None:
    """Prompt tokens are those of the rendered conversation, completion tokens the engine's."""
    engine = FakeEngine(EURO)
    usage = ask("/v1/chat/completions", CHAT, engine)["usage"]
    prompt = len(tokenizer().render(CHAT["messages"]))
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == len(engine.token_ids)
    assert usage["total_tokens"] == prompt + len(engine.token_ids)


@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_ends_the_request(size: int) -> None:
    """The text ends before it, its tokens are counted, and the engine's request ends."""
    engine = FakeEngine(EURO, size=size)
    body = {**CHAT, "stop": [", 你好", "never"]}
    whole = ask("/v1/chat/completions", body, engine)
    parts = stream("/v1/chat/completions", body, FakeEngine(EURO, size=size))
    assert whole["choices"][0]["message"]["content"] == "It is 5 €"
    assert whole["choices"][0]["finish_reason"] == "stop"
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == "It is 5 €"
    until = len(tokenizer().encode("It is 5 €, 你好", add_special_tokens=False))
    assert whole["usage"]["completion_tokens"] == until
    assert engine.left.is_set()


@pytest.mark.parametrize(
    "prompt", ["Say", ["Say", "more"], [1, 5, 9], [[1, 5], [6]]], ids=["one", "two", "ids", "lists"]
)
def test_a_completion_is_openais(prompt: Any) -> None:
    """Every form of prompt, whole and streamed, is OpenAI's object with one choice a prompt."""
    body = {"prompt": prompt, "echo": True}
    whole = Completion.model_validate(ask("/v1/completions", body), strict=True)
    parts = stream("/v1/completions", body)
    for part in parts:
        Completion.model_validate(part | {"choices": []}, strict=True)
    texts = [""] * len(whole.choices)
    for part in parts:
        for choice in part["choices"]:
            texts[choice["index"]] += choice["text"]
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == list(range(len(texts)))
    assert all(text.endswith(" Hello there.") for text in texts)


def test_completion_logprobs_have_offsets() -> None:
    """Tokens, log probabilities and offsets are as long as each other and fit the text."""
    whole = Completion.model_validate(
        ask("/v1/completions", {"prompt": "a", "logprobs": 2}), strict=True
    )
    scores = whole.choices[0].logprobs
    assert scores is not None
    assert "".join(scores.tokens or []) == whole.choices[0].text
    for offset, token in zip(scores.text_offset or [], scores.tokens or [], strict=True):
        assert whole.choices[0].text[offset:].startswith(token)
    assert len(scores.token_logprobs or []) == len(scores.top_logprobs or [])


def test_the_plain_route() -> None:
    """`/prompt` answers with text, reason, usage and model; its stream with tokens."""
    whole = ask("/prompt", {"prompt": "Hi"})
    parts = stream("/prompt", {"prompt": "Hi"})
    assert set(whole) == {"text", "finish_reason", "usage", "model"}
    assert "".join(part["token"] for part in parts) == whole["text"] == "Hello there."
    assert [part["finished"] for part in parts] == [False] * (len(parts) - 1) + [True]
    last = {name: whole[name] for name in ("finish_reason", "usage", "model")}
    assert parts[-1] == {"token": "", "finished": True, **last}


def test_the_defaults_are_those_of_each_route() -> None:
    """Checks max_tokens and temperature of requests that have neither."""
    engine = FakeEngine()
    ask("/prompt", {"prompt": "Hi"}, engine)
    ask("/v1/completions", {"prompt": "Hi"}, engine)
    ask("/v1/chat/completions", CHAT, engine)
    ask("/v1/chat/completions", CHAT, engine, api={"max_tokens_limit": 20})
    room = MAX_MODEL_LEN - len(tokenizer().render(CHAT["messages"]))
    chosen = [(params.max_tokens, params.temperature) for _, params in engine.requests]
    assert chosen == [(512, 0.7), (16, 1.0), (room, 1.0), (20, 1.0)]


def test_every_sampling_field_reaches_the_engine() -> None:
    """The request's sampling fields reach the engine unchanged."""
    engine = FakeEngine()
    plain = {
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": -3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    }
    special = {"logit_bias": {"5": 2.5}, "stop_token_ids": [7, 8], "max_completion_tokens": 9}
    ask("/v1/chat/completions", {**CHAT, **plain, **special}, engine)
    params = engine.requests[0][1]
    assert {name: getattr(params, name) for name in plain} == plain
    assert params.logit_bias == {5: 2.5}
    assert params.stop_token_ids == {7, 8}
    assert (params.max_tokens, params.logprobs) == (9, None)


def test_a_batch_is_answered_in_order_and_item_by_item() -> None:
    """Strings and bodies, shared fields, a bad item in its own place, and many at once."""
    engine = FakeEngine()
    bodies = ["Hi", {"prompt": "Hi", "max_tokens": 3}, {"prompt": "Hi", "temperature": 3}, 5]
    whole = ask("/prompt", {"prompts": bodies, "max_tokens": 7}, engine)
    good, also, bad, odd = whole["results"]
    assert whole["total_processed"] == 4
    assert set(good) == set(also) == {"text", "finish_reason", "usage"}
    assert (bad["error"]["param"], odd["error"]["param"]) == ("temperature", "items")
    assert [params.max_tokens for _, params in engine.requests] == [7, 3]
    assert engine.max_num_seqs == 2


def test_a_dead_engine_fails_a_batch_as_a_whole() -> None:
    """The death of the engine is no item's error: the list may be sent again, and a job of it is
    run once more."""
    engine = FakeEngine(error=EngineDead("The engine has stopped."))
    *_, last = asyncio.run(items(server(engine), "/prompt", {"prompts": [5, "Hi", "Ho"]}))
    assert (last["status"], last["error"]["error"]["code"]) == (503, "engine_dead")


def test_a_batch_tells_how_far_it_is() -> None:
    """The handle yields progress after each item, failed ones included, and then the body."""
    said = asyncio.run(items(server(), "/prompt", {"prompts": ["Hi", 5, "Ho"]}))
    assert [item["progress"] for item in said[:3]] == [
        {"progress": 33, "message": "1 of 3 done"},
        {"progress": 66, "message": "2 of 3 done"},
        {"progress": 100, "message": "3 of 3 done"},
    ]
    (last,) = said[3:]
    assert (last["status"], last["body"]["total_processed"]) == (200, 3)


def test_a_batch_never_overruns_the_queue() -> None:
    """At most `max_num_seqs` items of a list run at once, so none is refused for a full queue."""
    engine = FakeEngine()
    one = server(engine, **{"engine": {"max_num_seqs": 3, "max_waiting": 0}})
    whole = asyncio.run(answer(one, "/prompt", {"items": ["Hi"] * 20}))
    assert not any("error" in result for result in whole["results"])
    assert engine.max_num_seqs == 3


@pytest.mark.parametrize("name", ["prompts", "items"])
def test_an_empty_list_has_empty_results(name: str) -> None:
    """An empty list of prompts is answered with no results."""
    whole = asyncio.run(answer(server(), "/prompt", {name: []}))
    assert whole == {"results": [], "total_processed": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_never_overrun_the_queue(stream: bool) -> None:
    """A completion of more prompts than places is answered whole, a few prompts at a time."""
    engine = FakeEngine()
    one = server(engine, **{"engine": {"max_num_seqs": 3, "max_waiting": 0}})
    body = {"prompt": ["Hi"] * 20}
    ask = chunks(one, "/v1/completions", body) if stream else answer(one, "/v1/completions", body)
    said: Any = asyncio.run(ask)
    choices = [c for chunk in said for c in chunk["choices"]] if stream else said["choices"]
    assert {choice["index"] for choice in choices if choice["finish_reason"]} == set(range(20))
    assert engine.max_num_seqs == 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompts": ["Hi"] * 1001}, "prompts"),
        ({"prompts": "Hi"}, "prompts"),
        ({"items": {}}, "items"),
        ({"prompts": ["a"], "items": ["b"]}, "items"),
        ({"prompts": ["a"], "prompt": "b"}, "prompt"),
        ({"prompts": ["a"], "stream": True}, "stream"),
        ({"prompts": ["a"], "n": 2}, "n"),
        ({"prompts": ["a"], "temperature": 2.1}, "temperature"),
        ({"prompts": ["a"], "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"prompts": ["a"], "colour": 1}, "colour"),
        ({"prompts": ["a"], "stop": "\ud800"}, "stop"),
    ],
)
def test_a_bad_batch_is_refused_as_a_whole(body: Any, param: str) -> None:
    """A list that is wrong itself gives one error, not one for each item."""
    assert ask("/prompt", body)["error"]["param"] == param


def test_tokenize_and_detokenize() -> None:
    """vLLM's answers; text comes back from its ids."""
    said = ask("/tokenize", {"prompt": "Hi 你", "return_token_strs": True})
    assert said["tokens"] == tokenizer().encode("Hi 你")
    assert (said["count"], said["max_model_len"]) == (len(said["tokens"]), MAX_MODEL_LEN)
    assert said["token_strs"][0] == "<s>"
    assert ask("/tokenize", {"prompt": "Hi"})["token_strs"] is None
    assert ask("/detokenize", {"tokens": said["tokens"]}) == {"prompt": "<s> Hi 你"}
    turns = ask("/tokenize", CHAT)
    assert turns["tokens"] == tokenizer().render(CHAT["messages"])


LONG = "word " * MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "gpt"}, 404, "model_not_found", "model"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model_not_found", "model"),
        ("/v1/completions", {"prompt": LONG}, 400, "context_length_exceeded", "prompt"),
        # Too long before it is anything else: the ids are not looked at.
        ("/v1/completions", {"prompt": [-1] * 2000}, 400, "context_length_exceeded", "prompt"),
        ("/prompt", {"prompt": LONG}, 400, "context_length_exceeded", "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        ("/tokenize", {"messages": [{"role": "system", "content": "a"}]}, 400, None, "messages"),
        (
            "/prompt",
            {"prompt": "a", "max_tokens": MAX_MODEL_LEN},
            400,
            "context_length_exceeded",
            "max_tokens",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "max_completion_tokens": MAX_MODEL_LEN},
            400,
            "context_length_exceeded",
            "max_completion_tokens",
        ),
        ("/prompt", {"prompt": "a" * 100_001}, 400, None, "prompt"),
        ("/v1/completions", {"prompt": [768]}, 400, None, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, 400, None, "prompt"),
        ("/detokenize", {"tokens": [2**70]}, 400, None, "tokens"),
        ("/prompt", {"prompt": "a", "stop_token_ids": [-1]}, 400, None, "stop_token_ids"),
        ("/prompt", {"prompt": "a", "logit_bias": {"768": 1}}, 400, None, "logit_bias"),
        ("/v2/prompt", {}, 404, "not_found", None),
        ("/health", {}, 405, None, None),
    ],
)
def test_what_cannot_be_is_refused_before_the_engine(
    path: str, body: Any, status: int, code: str | None, param: str | None
) -> None:
    """Status, code and param of a request that must change; nothing was started."""
    engine = FakeEngine()
    (item,) = asyncio.run(items(server(engine), path, body))
    error = item["error"]["error"]
    assert (item["status"], error["code"], error["param"]) == (status, code, param)
    assert (error["type"], error["request_id"]) == ("invalid_request_error", "r1")
    assert not engine.requests


def test_a_huge_number_is_not_said_back() -> None:
    """The sentence about it stays short."""
    error = ask("/prompt", {"prompt": "a", "max_tokens": 10**200})["error"]
    assert error["param"] == "max_tokens"
    assert len(error["message"]) < 300


NUMBERS = [1] * 500_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": NUMBERS}),
        ("/detokenize", {"tokens": [0] * 99_999, "colour": NUMBERS}),
        ("/prompt", {"prompts": [{"messages": CHAT["messages"] * 4096, "colour": 1}] * 10}),
        ("/prompt", {"prompts": [""] * 1000}),
    ],
    ids=range(4),
)
def test_a_large_body_leaves_the_event_loop_alone(path: str, body: Any) -> None:
    """The event loop runs other callbacks while a large body is read and refused."""
    # Two busy threads take turns this often, in seconds.
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)

    async def num_turns() -> int:
        task = asyncio.create_task(answer(server(), path, body))
        num_turns = 0
        while not task.done():
            await asyncio.sleep(0)
            num_turns += 1
        return num_turns

    # Read at once, or in a thread that never lets go of the interpreter, it would be a handful.
    try:
        assert asyncio.run(num_turns()) > 25
    finally:
        sys.setswitchinterval(interval_s)


def test_models_are_listed_by_their_public_names() -> None:
    """Lists both names, and returns each alone; an answer's model is the first one."""

    async def look() -> None:
        model = {"name": "tiny", "quantization": "none", "served_model_name": "a/b, c"}
        one = server(model=model)

        async def get(path: str) -> Any:
            (item,) = [item async for item in one.call("GET", path, None, "r")]
            return item

        listed = (await get("/v1/models"))["body"]
        assert [card["id"] for card in listed["data"]] == ["a/b", "c"]
        assert (await get("/v1/models/a/b"))["body"] == listed["data"][0]
        assert (await get("/v1/models/x"))["status"] == 404
        assert (await answer(one, "/v1/completions", {"prompt": "a", "model": "c"}))[
            "model"
        ] == "a/b"

    asyncio.run(look())
