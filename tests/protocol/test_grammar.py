"""Grammars: what the request may ask for, and which token ids they allow."""

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from serve_app.protocol.grammar_source import MAX_CHARS, GrammarSource
from serve_app.protocol.tokenizer import Tokenizer
from tests.fakes import VOCAB_SIZE, tokenizer

EOS = 2


def source(**fields: Any) -> GrammarSource | None:
    """Returns the grammar of a chat request with these fields."""
    hello = [{"role": "user", "content": "Hello"}]
    return ChatRequest.read({"messages": hello, **fields}).grammar


def compiled_grammar(found: GrammarSource, *, begins_text: bool = True) -> CompiledGrammar:
    compiler = GrammarCompiler(tokenizer().backend, VOCAB_SIZE, {EOS})
    return asyncio.run(compiler.compiled(found, begins_text=begins_text))


def compiled(found: GrammarSource | None, *, begins_text: bool = True) -> GrammarState:
    assert found is not None
    return compiled_grammar(found, begins_text=begins_text).start()


def allowed(state: GrammarState, vocab_size: int = VOCAB_SIZE) -> list[int]:
    words = np.zeros(-(-vocab_size // 32), np.int32)
    state.fill(words)
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    ids: list[int] = np.flatnonzero(bits).tolist()
    return ids


def follow(
    state: GrammarState, choose: Any, max_tokens: int = 400, vocab_size: int = VOCAB_SIZE
) -> list[int]:
    """Returns the tokens that `choose` takes of the allowed ones, until the grammar or EOS ends
    them."""
    ids: list[int] = []
    while not state.is_complete and len(ids) < max_tokens:
        token_id = choose(allowed(state, vocab_size))
        if token_id == EOS:
            break
        state.accept(token_id)
        ids.append(token_id)
    return ids


def text(ids: Sequence[int], *, prompt_ids: Sequence[int] = ()) -> str:
    """Returns what the client sees."""
    detokenizer = Detokenizer(tokenizer().backend, prompt_ids=prompt_ids)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize(
    ("fields", "kind", "content"),
    [
        ({"response_format": {"type": "json_object"}}, "json", '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": {"type": "null"}},
                }
            },
            "json",
            '{"type": "null"}',
        ),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json", '{"type": "null"}'),
        ({"structured_outputs": {"json_object": True}}, "json", '{"type": "object"}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
        (
            {"structured_outputs": {"regex": "a", "choice": None}, "response_format": None},
            "regex",
            "a",
        ),
    ],
)
def test_grammars_of_openai_and_vllm_are_read(
    fields: dict[str, Any], kind: str, content: str
) -> None:
    """Each way to set a grammar gives its kind and text."""
    found = source(**fields)
    assert found is not None
    assert (found.kind, found.text) == (kind, content)


def test_plain_text_has_no_grammar() -> None:
    """The type `text`, and no field at all, leave the answer free."""
    assert source() is None
    assert source(response_format={"type": "text"}) is None


SCHEMA = "response_format.json_schema.schema"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * (MAX_CHARS + 1)}}, "structured_outputs.regex"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        ({"guided_json": {"type": "object"}}, "guided_json"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    """The error's `param` is the field that is wrong."""
    with pytest.raises(InvalidRequest) as raised:
        source(**fields)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: nope"}, "nope"),
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "string", "format": "idn-email"}}, "idn-email"),
        ({"grammar": "root ::= nope"}, "nope"),
        ({"grammar": "root ::= a" + " a" * 10_000}, "Lark"),
        ({"json": {"allOf": [{"pattern": f"^.*{c}.*$"} for c in "abcdefghijklmnop"]}}, "empty"),
        ({"json": {"type": "nothing"}}, "structured_outputs.json"),
        ({"json": {"$ref": "#"}}, "too complex"),
        ({"json": {"type": "integer", "multipleOf": 1_000_003}}, "multipleOf"),
        ({"json": {"type": "integer", "multipleOf": float("inf")}}, "cannot be used"),
        ({"json": {"type": "integer", "multipleOf": True}}, "multipleOf"),
        ({"json": {"type": "integer", "multipleOf": 10**400}}, "multipleOf"),
        ({"json": {"anyOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}}, "multipleOf"),
        ({"json": {"exclusiveMinimum": -9e18, "maximum": 0, "multipleOf": 10**9 + 7}}, "multiple"),
        ({"grammar": "start: a\na: b\nb: a"}, "too complex"),
    ],
)
def test_a_grammar_that_cannot_be_held_is_refused(fields: dict[str, Any], words: str) -> None:
    """A grammar with an error or an unsupported keyword is refused with an error, never ignored."""
    with pytest.raises(InvalidRequest, match=words) as raised:
        compiled(source(structured_outputs=fields))
    assert raised.value.param == f"structured_outputs.{next(iter(fields))}"


VLLM_GRAMMAR = """
    root ::= select_statement
    select_statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
"""The example of vLLM's documentation."""


def test_a_grammar_may_be_in_the_notation_of_vllms_documentation() -> None:
    """GBNF and Lark are told apart by their rules, so clients of vLLM need no change."""
    state = compiled(source(structured_outputs={"grammar": VLLM_GRAMMAR}))
    found = text(follow(state, lambda ids: ids[-1]))
    assert re.fullmatch(r"SELECT col_[12]  from table_[12]  where col_[12] = [12] ", found)
    lark = 'start: "::=" "b"  // a ::= b'
    assert text(follow(compiled(source(structured_outputs={"grammar": lark})), max)) == "::=b"


def test_thousands_of_choices_are_one_grammar() -> None:
    """A label set of 5,000 names is no more complex than one name."""
    names = [f"name {number}" for number in range(5000)]
    state = compiled(source(structured_outputs={"choice": names}))
    assert text(follow(state, lambda ids: ids[-1])) in names
    assert not state.has_failed


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "format": "path", "maxLength": 3},
        {"type": "object", "properties": {"a": {"type": "string", "format": "password"}}},
        {"type": "array", "uniqueItems": False, "items": {"type": "integer"}},
        {"properties": {"a": {"multipleOf": 0.01}, "b": {"multipleOf": 500}}},
        {"$defs": {"a": {"type": "string", "format": "uuid4"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_keyword_that_restricts_nothing_is_no_error(schema: dict[str, Any]) -> None:
    """pydantic writes formats for its own types, which JSON schema does not define and says to
    ignore; zod writes `uniqueItems: false`."""
    state = compiled(source(structured_outputs={"json": schema}))
    assert allowed(state)


CHOICES = ["yes", "no", ' "x"', "ja/nein\\", "ü🙂", "<s>", "two\nlines"]


@given(st.data(), st.booleans())
def test_every_path_is_one_of_the_choices(data: st.DataObject, begins_text: bool) -> None:
    """Whatever allowed tokens are taken, the client's text is a choice: at the beginning of a text,
    whose first space is not shown, and where the answer continues a prompt."""
    state = STATES[begins_text].start()
    ids = follow(state, lambda ids: data.draw(st.sampled_from(ids)))
    prompt_ids = () if begins_text else tokenizer().encode("Q:", add_special_tokens=False)
    assert text(ids, prompt_ids=prompt_ids) in CHOICES


class _States(dict[bool, Any]):
    """The compiled choices, made once."""

    def __missing__(self, begins_text: bool) -> Any:
        compiler = GrammarCompiler(tokenizer().backend, VOCAB_SIZE, {EOS})
        found = GrammarSource("choice", json.dumps(CHOICES), "f")
        self[begins_text] = asyncio.run(compiler.compiled(found, begins_text=begins_text))
        return self[begins_text]


STATES = _States()


def test_spaces_between_json_tokens_have_an_end() -> None:
    """A model that prefers spaces writes 40 of them, and then goes on."""
    state = compiled(source(response_format={"type": "json_object"}))

    def spaces_first(ids: list[int]) -> int:
        return max(ids, key=lambda it: not tokenizer().token_bytes(it).strip())

    ids = follow(state, spaces_first, max_tokens=90)
    assert any(tokenizer().token_bytes(it).strip() for it in ids[2:])


def test_mixtrals_tokenizer_hides_its_first_space_too(mixtral_tokenizer: Tokenizer) -> None:
    """With 32,000 tokens, the natural first token `▁yes` is what a choice allows in a chat."""
    compiler = GrammarCompiler(mixtral_tokenizer.backend, 32_000, {EOS})
    found = GrammarSource("choice", '["yes"]', "f")
    state = asyncio.run(compiler.compiled(found, begins_text=True)).start()
    words = np.zeros(1000, np.int32)
    state.fill(words)
    first = mixtral_tokenizer.backend.token_to_id("▁yes")
    assert np.unpackbits(words.view(np.uint8), bitorder="little")[first]
    state.accept(first)
    assert state.is_complete
    assert mixtral_tokenizer.decode([first]) == "yes"


@pytest.mark.parametrize("name", ["</s>", "<s>", "<unk>"])
def test_the_name_of_a_special_token_is_text(mixtral_tokenizer: Tokenizer, name: str) -> None:
    """A constant with such a name is written with other tokens, and in full."""
    found = GrammarSource("json", json.dumps({"const": {"a": name}}), "f")
    compiler = GrammarCompiler(mixtral_tokenizer.backend, 32_000, {EOS})
    state = asyncio.run(compiler.compiled(found, begins_text=True)).start()
    token_bytes = mixtral_tokenizer.token_bytes
    ids = follow(
        state, lambda ids: max(ids, key=lambda it: len(token_bytes(it).strip())), 90, 32_000
    )
    assert not {0, 1, 2} & set(ids)
    assert json.loads(mixtral_tokenizer.decode(ids)) == {"a": name}


def test_a_grammar_is_compiled_once() -> None:
    """The same grammar of another request is not compiled again, and the requests do not share
    their state."""
    compiler = GrammarCompiler(tokenizer().backend, VOCAB_SIZE, {EOS})

    async def twice() -> list[Any]:
        found = [source(structured_outputs={"choice": ["yes", "no"]}) for _ in range(2)]
        return [await compiler.compiled(each, begins_text=True) for each in found if each]

    first, second = asyncio.run(twice())
    assert first is second
    one, other = first.start(), first.start()
    follow(one, lambda ids: ids[0])
    assert (one.is_complete, other.is_complete) == (True, False)


def test_stop_tokens_end_an_answer_where_it_may_end() -> None:
    """A stop token of the request is allowed as the end of the grammar's text, and only there."""
    compiler = GrammarCompiler(tokenizer().backend, VOCAB_SIZE, {EOS})
    found = GrammarSource("regex", "(ab)*", "f")
    whole = asyncio.run(compiler.compiled(found, begins_text=False))
    state = whole.with_stops([5, 700]).start()
    assert {EOS, 5, 700} <= set(allowed(state))
    assert not {5, 700} & set(allowed(whole.start()))
    state.accept(tokenizer().encode("xa", add_special_tokens=False)[-1])
    assert not {EOS, 5, 700} & set(allowed(state))
