"""Tools over chat completions: the tiny Mixtral and OpenAI's client, checked by jsonschema."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.api.conftest import Endpoint
from tests.api.test_structured_outputs import CLOSING
from tests.fakes import FakeEngine
from tests.tool_sets import Tools, function, tool_sets

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
PARIS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER = function("get_weather", PARIS, description="The weather in a city.")
NOW = function("now")
NONE = {"tool_choice": "none"}


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    """One server with the tiny model in float32."""
    server = MixtralServer(Settings(model={"name": "tiny", "quantization": "none"}))
    yield server
    server.close()


async def items(server: MixtralServer, **fields: Any) -> list[Any]:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 120, **fields}
    return [item async for item in server.call("POST", CHAT, body, "1")]


def ask(server: MixtralServer, **fields: Any) -> Any:
    """Returns the choice of an answer that is no error."""
    (item,) = asyncio.run(items(server, **fields))
    ChatCompletion.model_validate(item["body"], strict=True)
    (choice,) = item["body"]["choices"]
    return choice


def error(server: MixtralServer, **fields: Any) -> Any:
    (item,) = asyncio.run(items(server, **fields))
    assert item["status"] == 400, item
    return item["error"]["error"]


def calls(choice: Any) -> list[tuple[str, Any]]:
    """Returns the names and arguments."""
    found = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return [(each["name"], json.loads(each["arguments"])) for each in found]


def chunks(server: MixtralServer, **fields: Any) -> list[Any]:
    """Returns the chunks of a stream, each of which is one of the openai package's."""
    found = [item["chunk"] for item in asyncio.run(items(server, stream=True, **fields))]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return found


@pytest.mark.timeout(600)  # 20,000 tokens with grammars
@pytest.mark.parametrize("is_named", [False, True])
def test_fifty_sets_of_tools_give_valid_calls(tiny: MixtralServer, is_named: bool) -> None:
    """At temperature 1, in one batch, each answer that is not cut calls tools of its own set with
    arguments that are valid; a named tool is called once; hardly an answer is cut."""
    sets = tool_sets()
    assert len(sets) == 50

    async def answers() -> Any:
        return await asyncio.gather(
            *(
                items(
                    tiny,
                    tools=tools,
                    tool_choice=tools[seed % len(tools)] if is_named else "required",
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
        if is_named:
            assert [name for name, _ in found] == [tools[seed % len(tools)]["function"]["name"]]
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


def test_auto_is_the_default_and_may_answer_in_text(tiny: MixtralServer) -> None:
    """Without `tool_choice` the model may answer in text, which no grammar changes."""
    free = ask(tiny, tools=[WEATHER])
    assert free["message"]["content"]
    assert "tool_calls" not in free["message"]
    assert free["finish_reason"] == "stop"
    assert free == ask(tiny, tools=[WEATHER], tool_choice="auto")


def test_stop_tokens_end_a_free_answer_with_tools(tiny: MixtralServer) -> None:
    """`stop_token_ids` may be control tokens, which text with tools has not."""
    how: dict[str, Any] = {"logit_bias": {"0": 100}, "stop_token_ids": [0]}
    choice = ask(tiny, tools=[WEATHER], **how)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert calls(ask(tiny, tools=[WEATHER], tool_choice="required", **how, max_tokens=60))


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


def test_none_does_not_call_and_one_call_is_one(tiny: MixtralServer) -> None:
    """`none` leaves the prompt and the answer as they are without tools; without parallel calls
    there is exactly one."""
    (plain,), (none,) = (
        asyncio.run(items(tiny, **fields)) for fields in ({}, {"tools": [WEATHER], **NONE})
    )
    assert {**none["body"], "created": 0} == {**plain["body"], "created": 0}
    more = {str(tiny.tokenizer.encode(",", add_special_tokens=False)[-1]): 50}
    how: dict[str, Any] = {"tools": [WEATHER], "tool_choice": "required", "logit_bias": more}
    assert len(calls(ask(tiny, **how, parallel_tool_calls=False))) == 1
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert len(calls(ask(tiny, **{**how, "tools": [NOW, WEATHER], "tool_choice": named}))) == 1


def test_allowed_tools_are_the_only_ones_that_are_called(tiny: MixtralServer) -> None:
    """OpenAI's `allowed_tools` calls none of the others."""
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "now"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    found = calls(ask(tiny, tools=[WEATHER, NOW], tool_choice=choice, logit_bias=CLOSING))
    assert {name for name, _ in found} == {"now"}


def test_mistrals_any_means_required(tiny: MixtralServer) -> None:
    """`tool_choice: "any"`, which Mistral's API has, gives the answer of `required`."""
    any_call, required = (
        calls(ask(tiny, tools=[WEATHER, NOW], tool_choice=choice, logit_bias=CLOSING))
        for choice in ("any", "required")
    )
    assert any_call == required != []


def test_text_follows_its_own_format_beside_tools(tiny: MixtralServer) -> None:
    """With `response_format` and tools, an answer without a call follows the format."""
    schema = {"type": "object", "properties": {"x": {"const": 1}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for tool_choice in ("auto", "none"):
        brace = {str(tiny.tokenizer.encode("{", add_special_tokens=False)[-1]): 100}
        how: dict[str, Any] = {"tool_choice": tool_choice, "logit_bias": brace | CLOSING}
        choice = ask(tiny, tools=[WEATHER], response_format=form, **how)
        assert json.loads(choice["message"]["content"])["x"] == 1
    assert calls(ask(tiny, tools=[NOW], response_format=form, tool_choice="required"))


def test_a_malformed_call_is_content(endpoint: Endpoint) -> None:
    """What an engine writes that is no call reaches the client as text, whole and streamed."""
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


UNIQUE = {"type": "object", "properties": {"l": {"type": "array", "uniqueItems": True}}}
PATTERNS = [{"pattern": f"^.*{c}.*$"} for c in "abcdefghijklmnop"]
EXPLODES = {
    "type": "object",
    "properties": {"a": {"type": "string", "allOf": PATTERNS}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [function("no spaces")]}, "tools.0"),
        ({"tools": [function("")]}, "tools.0"),
        ({"tools": [NOW, NOW]}, "tools.1"),
        ({"tools": [NOW] * 129}, "tools"),
        ({"tools": [NOW, function("f", [])]}, "tools.1.function.parameters"),
        ({"tools": [function("f", {"type": "string"})]}, "tools.0.function.parameters"),
        ({"tools": [function("f", {"properties": 3})]}, "tools.0.function.parameters"),
        ({"tools": [NOW], "tool_choice": "one"}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"name": "now"}}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": WEATHER}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": WEATHER}, "tool_choice"),
        ({"tools": [NOW], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [NOW], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        (
            {"tools": [NOW, function("f", UNIQUE)], "tool_choice": "required"},
            "tools.1.function.parameters",
        ),
        ({"tools": [NOW, function("f", UNIQUE, strict=True)]}, "tools.1.function.parameters"),
        ({"tools": [NOW, function("f", EXPLODES)]}, "tools.1.function.parameters"),
    ],
)
def test_a_bad_field_is_named(tiny: MixtralServer, fields: dict[str, Any], param: str) -> None:
    """Each error is a sentence with the field that is wrong."""
    found = error(tiny, **fields)
    assert found["param"] == param
    assert found["message"].endswith(".")


def test_the_old_fields_name_the_new_ones(tiny: MixtralServer) -> None:
    """`functions` and `function_call` are answered with what to use instead."""
    assert "use `tools`" in error(tiny, functions=[{"name": "f"}])["message"]
    assert "use `tool_choice`" in error(tiny, function_call={"name": "f"})["message"]


def test_a_keyword_that_cannot_be_held_stops_no_free_answer(tiny: MixtralServer) -> None:
    """With `auto`, a schema with `uniqueItems` is held as far as possible, unless it is strict."""
    assert ask(tiny, tools=[NOW, function("f", UNIQUE)])["message"]["content"]


def test_no_tools_is_no_tools(tiny: MixtralServer) -> None:
    """Clients send empty lists and modes that ask for nothing."""
    plain = ask(tiny)
    given: list[dict[str, Any]] = [
        {"tools": []},
        {"tools": None, "tool_choice": None},
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": False},
        {"functions": [], "function_call": "none"},
    ]
    for fields in given:
        assert ask(tiny, **fields) == plain


@pytest.mark.parametrize("path", ["/prompt", "/v1/completions"])
def test_other_routes_refuse_tools(tiny: MixtralServer, path: str) -> None:
    """The error says which route calls tools."""

    async def answer() -> Any:
        body = {"prompt": "Hi", "tools": [WEATHER]}
        return [item async for item in tiny.call("POST", path, body, "1")]

    (item,) = asyncio.run(answer())
    assert item["status"] == 400
    assert item["error"]["error"]["param"] == "tools"
    assert CHAT in item["error"]["error"]["message"]


def test_tokenize_counts_tools(tiny: MixtralServer) -> None:
    """`/tokenize` of a conversation with tools has the ids of its prompt; raw text has no tools."""

    async def post(path: str, **body: Any) -> Any:
        return [item async for item in tiny.call("POST", path, body, "1")][-1]

    prompt = {"messages": QUESTION, "tools": [WEATHER, NOW]}
    counted = asyncio.run(post("/tokenize", **prompt))["body"]
    answered = asyncio.run(post(CHAT, **prompt, max_tokens=1))["body"]
    assert len(counted["tokens"]) == counted["count"] == answered["usage"]["prompt_tokens"]
    assert "get_weather" in tiny.tokenizer.decode(counted["tokens"])
    refused = asyncio.run(post("/tokenize", prompt="Hi", tools=[NOW]))
    assert refused["error"]["error"]["param"] == "tools"


def test_many_tools_count_as_prompt(tiny: MixtralServer) -> None:
    """Descriptions that are longer than a prompt may be are refused."""
    found = error(tiny, tools=[function("f", description="x" * 100_001)])
    assert found["param"] == "messages"


@pytest.mark.timeout(600)  # some 75,000 tokens of prompts
def test_sets_are_read(tiny: MixtralServer) -> None:
    """Every set of tools passes with `auto` too."""

    async def answers() -> Any:
        sets: list[Tools] = tool_sets()
        return await asyncio.gather(*(items(tiny, tools=tools, max_tokens=2) for tools in sets))

    for (item,) in asyncio.run(answers()):
        assert item["status"] == 200, item
