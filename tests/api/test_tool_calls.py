"""Calls of tools in chat completions, by the tiny Mixtral and OpenAI's client."""

import asyncio
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from serve_app.api.server import MixtralServer
from tests.api.conftest import Endpoint
from tests.api.test_structured_outputs import CLOSING
from tests.api.tool_requests import (
    NOW,
    QUESTION,
    WEATHER,
    ask,
    calls,
    chunks,
    items,
)
from tests.fakes import FakeEngine
from tests.tool_sets import tool_sets


@pytest.mark.timeout(600)  # 10,000 tokens with grammars
def test_fifty_sets_of_tools_give_valid_calls(tiny: MixtralServer) -> None:
    """At temperature 1, in one batch, each answer that is not cut calls tools of its own set with
    arguments that are valid; a tool that is named, as for every other set, is called once; hardly
    an answer is cut."""
    sets = tool_sets()
    assert len(sets) == 50

    def choice_of(seed: int) -> Any:
        return sets[seed][seed % len(sets[seed])] if seed % 2 else "required"

    async def answers() -> Any:
        return await asyncio.gather(
            *(
                items(
                    tiny,
                    tools=tools,
                    tool_choice=choice_of(seed),
                    temperature=1,
                    seed=seed,
                    max_tokens=400,
                    logit_bias=CLOSING,
                )
                for seed, tools in enumerate(sets)
            )
        )

    num_cut = 0
    for seed, (tools, (item,)) in enumerate(zip(sets, asyncio.run(answers()), strict=True)):
        assert item["status"] == 200, item
        (choice,) = item["body"]["choices"]
        if choice["finish_reason"] == "length":
            num_cut += 1
            continue
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        found = calls(choice)
        schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}
        if seed % 2:
            assert [name for name, _ in found] == [choice_of(seed)["function"]["name"]]
        assert found
        for name, arguments in found:
            assert isinstance(arguments, dict)
            jsonschema.validate(arguments, schemas[name] or {"maxProperties": 0})
    assert num_cut <= 10


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"]
    days: list[Literal["today", "tomorrow"]] | None


def test_openais_client_calls_a_tool_and_sends_its_result(
    endpoint: Endpoint, tiny: MixtralServer
) -> None:
    """`create`, `parse` and the stream helper give the same call; the message goes back unchanged,
    and the model answers to the result in text."""
    endpoint.server = tiny
    tool = openai.pydantic_function_tool(Weather)
    how: dict[str, Any] = {
        "model": "tiny",
        "messages": QUESTION,
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 120,
        "logit_bias": CLOSING,
    }
    with endpoint.client() as client:
        created = client.chat.completions.create(**how).choices[0]
        parsed = client.chat.completions.parse(**how).choices[0].message
        with client.chat.completions.stream(**how) as stream:
            events = list(stream)
            final = stream.get_final_completion().choices[0]
        assert created.finish_reason == final.finish_reason == "tool_calls"
        (call,) = created.message.tool_calls or []
        (parsed_call,) = parsed.tool_calls or []
        (streamed,) = final.message.tool_calls or []
        assert isinstance(parsed_call.function.parsed_arguments, Weather)
        assert streamed.function.parsed_arguments == parsed_call.function.parsed_arguments
        assert call.type == "function"
        assert call.function.arguments == parsed_call.function.arguments
        pieces = [
            e.arguments_delta for e in events if e.type == "tool_calls.function.arguments.delta"
        ]
        assert "".join(pieces) == call.function.arguments
        assert len(pieces) > 1
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue"}'}
        how["messages"] = [*QUESTION, created.message.model_dump(), result]
        answer = client.chat.completions.create(**{**how, "tool_choice": "none"}).choices[0]
    assert answer.finish_reason in ("stop", "length")
    assert answer.message.content
    assert answer.message.tool_calls is None


def test_the_chunks_of_a_stream_are_the_whole_answer(tiny: MixtralServer) -> None:
    """The pieces of each call together are the call of the whole answer, in order, and the first
    piece has id, type, name and no arguments."""
    how: dict[str, Any] = {
        "tools": [WEATHER, NOW],
        "tool_choice": "required",
        "logit_bias": CLOSING,
    }
    streamed = chunks(tiny, **how, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed if chunk["choices"]]
    pieces = [piece for delta in deltas for piece in delta.get("tool_calls", [])]
    first = [piece for piece in pieces if "id" in piece]
    assert all(piece["function"]["arguments"] == "" for piece in first)
    assert all(piece["id"].startswith("call_") and piece["type"] == "function" for piece in first)
    assert [piece["index"] for piece in first] == list(range(len(first)))
    texts = [""] * len(first)
    for piece in pieces:
        texts[piece["index"]] += piece["function"]["arguments"]
    whole = ask(tiny, **how)
    assert calls(whole)
    functions = [(each["function"]["name"], text) for each, text in zip(first, texts, strict=True)]
    assert functions == [
        (call["function"]["name"], call["function"]["arguments"])
        for call in whole["message"]["tool_calls"]
    ]
    assert streamed[-2]["choices"][0]["finish_reason"] == whole["finish_reason"] == "tool_calls"
    assert streamed[-1]["usage"]["completion_tokens"] > 0


def test_an_answer_that_is_cut_ends_with_length(tiny: MixtralServer) -> None:
    """`max_tokens` in the middle of the arguments gives the pieces so far and `length`."""
    for max_tokens in range(24, 46):
        choice = ask(tiny, tools=[WEATHER], tool_choice="required", max_tokens=max_tokens)
        assert choice["finish_reason"] == "length"
        found = choice["message"].get("tool_calls")
        if found and 0 < len(found[0]["function"]["arguments"]) < len('{"city": "Rome"}'):
            break
    else:
        pytest.fail("No answer was cut in its arguments.")


def test_a_malformed_call_is_content(endpoint: Endpoint) -> None:
    """Text of an engine that is not a call reaches the client as text, whole and streamed."""
    text = '[TOOL_CALLS] [{"name": "rm", "arguments": {}}]'
    endpoint.serve(FakeEngine(text))
    how: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": [WEATHER]}
    with endpoint.client() as client:
        whole = client.chat.completions.create(**how).choices[0]
        stream = client.chat.completions.create(**how, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert whole.message.content == "".join(pieces) == text
    assert (whole.finish_reason, whole.message.tool_calls) == ("stop", None)


def test_text_before_a_call_is_content(endpoint: Endpoint) -> None:
    """A model that says something and then calls has both in its answer, and log probabilities of
    all tokens."""
    engine = endpoint.serve(FakeEngine('I look.\n[TOOL_CALLS] [{"name": "now", "arguments": {}}]'))
    how: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "tools": [NOW], "logprobs": True}
    with endpoint.client() as client:
        whole = client.chat.completions.create(**how).choices[0]
        with client.chat.completions.stream(**how) as stream:
            streamed = stream.get_final_completion().choices[0]
    assert whole.message.content == streamed.message.content == "I look."
    for choice in (whole, streamed):
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert (call.function.name, call.function.arguments) == ("now", "{}")
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or []) == len(engine.token_ids)
