"""The grammar of answers that may call tools: which tokens begin a call, and what follows."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol import tool_grammar
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.grammar import GrammarCompiler, GrammarState
from serve_app.protocol.text import TextDelta, TextStream
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.protocol.tool_calls import ToolCallParser
from serve_app.protocol.tools import Tool, ToolChoice, Tools, joined

EOS = 2
INTEGER = {"type": "object", "properties": {"x": {"enum": [1, 20]}}, "required": ["x"]}
TOOLS = (Tool("f", "", INTEGER, "tools.0"), Tool("now", "", {}, "tools.1"))


def start(tokenizer: Tokenizer, choice: ToolChoice, vocab_size: int = 32_768) -> GrammarState:
    compiler = GrammarCompiler(tokenizer.backend, vocab_size, {EOS}, tokenizer.tool_calls_id)
    source = tool_grammar.source(Tools(TOOLS, choice), None)
    return asyncio.run(compiler.compiled(source, begins_text=True)).start()


def allowed(state: GrammarState, vocab_size: int = 32_768) -> list[int]:
    words = np.zeros(-(-vocab_size // 32), np.int32)
    state.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    ids: list[int] = np.flatnonzero(bits).tolist()
    return ids


def answer(tokenizer: Tokenizer, ids: list[int]) -> TextDelta:
    """Returns what the client sees."""
    detokenizer = Detokenizer(tokenizer.backend, tool_calls_id=tokenizer.tool_calls_id)
    stream = TextStream(detokenizer, tool_calls=ToolCallParser({"f", "now"}))
    return stream.push(ids, (), "stop")


@pytest.mark.parametrize("mode", ["auto", "none", "required"])
def test_a_tool_token_begins_a_call(tool_tokenizer: Tokenizer, mode: Any) -> None:
    """With a token for calls, it is the first token where a call is required, one of them where the
    model may choose, and none where it may not call; text never contains control tokens."""
    begin = tool_tokenizer.tool_calls_id
    found = allowed(start(tool_tokenizer, ToolChoice(mode)))
    assert (begin in found) == (mode != "none")
    assert (found == [begin]) == (mode == "required")
    hello = tool_tokenizer.backend.token_to_id("▁Hello")
    assert (hello in found) == (mode != "required")
    assert not set(found) & (set(range(3, 15)) - {begin})


def test_a_free_answer_may_begin_with_any_text(tool_tokenizer: Tokenizer) -> None:
    """With `auto` and `none` the first token is any text, or the end, as without a grammar."""
    tokens = [
        EOS,
        *map(tool_tokenizer.backend.token_to_id, ("▁Hello", "Hello", "<0x0A>", "[", "▁[")),
    ]
    for mode in ("auto", "none"):
        assert set(tokens) <= set(allowed(start(tool_tokenizer, ToolChoice(mode))))


@pytest.fixture(scope="module")
def begun(tool_tokenizer: Tokenizer, mixtral_tokenizer: Tokenizer) -> Any:
    """Answers of both kinds of checkpoint: before a required call, and behind a text and the marker
    where a call was not required. Each with its tokens so far and its vocabulary's size."""
    found: list[Any] = []
    for tokenizer, size in ((tool_tokenizer, 32_768), (mixtral_tokenizer, 32_000)):
        found.append((tokenizer, start(tokenizer, ToolChoice("required"), size), [], size))
        marker = tokenizer.tool_calls_id
        text = "I look." if marker is not None else "I look. [TOOL_CALLS] "
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids += [] if marker is None else [marker]
        state = start(tokenizer, ToolChoice(), size)
        for token_id in ids:
            assert token_id in allowed(state, size)
            state.accept(token_id)
        found.append((tokenizer, state, ids, size))
    return found


@given(st.data(), st.integers(0, 3))
def test_every_path_is_a_valid_call(begun: Any, data: st.DataObject, which: int) -> None:
    """Once a call has begun, whatever allowed tokens are taken, in both vocabularies, the client
    gets calls of the tools with valid arguments."""
    tokenizer, begin, before, size = begun[which]
    state = GrammarState(begin._matcher.deep_copy())
    ids = list(before)
    while not state.is_complete:
        found = allowed(state, size)
        if len(ids) > 300:  # then the brackets that end the answer
            found = sorted(found, key=lambda it: tokenizer.token_bytes(it)[:1] not in b'}]"')[:1]
        ids.append(data.draw(st.sampled_from(found)))
        state.accept(ids[-1])
    delta = answer(tokenizer, ids)
    assert (delta.text, delta.finish_reason) == ("I look." * bool(before), "tool_calls")
    calls = joined(delta.tool_calls)
    assert calls
    for call in calls:
        arguments = json.loads(call.arguments)
        assert arguments == {} if call.name == "now" else arguments in ({"x": 1}, {"x": 20})


def test_text_before_a_tool_token_is_content(tool_tokenizer: Tokenizer) -> None:
    """Text, the token, and calls as the model was trained to write them."""
    calls = '[{"name": "f", "arguments": {"x": 1}}, {"name": "now", "arguments": {}}]'
    ids = [
        *tool_tokenizer.encode("I look, ümlaut 🙂", add_special_tokens=False),
        tool_tokenizer.tool_calls_id or 0,
        *tool_tokenizer.encode(calls, add_special_tokens=False),
    ]
    state = start(tool_tokenizer, ToolChoice())
    for token_id in ids:
        assert token_id in allowed(state)
        state.accept(token_id)
    assert state.is_complete
    delta = answer(tool_tokenizer, ids)
    assert delta.text == "I look, ümlaut 🙂"
    found = [(call.name, call.arguments) for call in joined(delta.tool_calls)]
    assert found == [("f", '{"x": 1}'), ("now", "{}")]


def test_half_a_character_before_a_tool_token_is_shown(tool_tokenizer: Tokenizer) -> None:
    """The token for calls ends a text whose last character is incomplete."""
    byte = tool_tokenizer.backend.token_to_id("<0xF0>")
    call = tool_tokenizer.encode('[{"name": "now", "arguments": {}}]', add_special_tokens=False)
    delta = answer(tool_tokenizer, [byte, tool_tokenizer.tool_calls_id or 0, *call])
    assert (delta.text, len(joined(delta.tool_calls))) == ("\ufffd", 1)


@pytest.mark.parametrize(
    ("parameters", "closed"),
    [
        ({}, {"type": "object", "properties": {}, "additionalProperties": False}),
        (INTEGER, {**INTEGER, "additionalProperties": False}),
        ({"type": "object"}, {"type": "object"}),
        ({**INTEGER, "additionalProperties": True}, {**INTEGER, "additionalProperties": True}),
        ({**INTEGER, "required": ["y"]}, {**INTEGER, "required": ["y"]}),
        ({"anyOf": [INTEGER]}, {"type": "object", "anyOf": [INTEGER]}),
        ({"properties": {}}, {"type": "object", "properties": {}, "additionalProperties": False}),
    ],
)
def test_arguments_have_no_names_but_the_schemas(parameters: Any, closed: Any) -> None:
    """A schema that lists its properties allows no others, unless it says so itself."""
    tools = Tools((Tool("f", "", parameters, "f"),), ToolChoice())
    assert json.loads(tool_grammar.source(tools, None).text)["calls"][0]["schema"] == closed
