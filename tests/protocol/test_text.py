"""Text comes whole: no broken characters, and the same text however the tokens come."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.delta import TokenLogprob
from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.scores import TokenScore
from serve_app.protocol.text import TextDelta, TextStream
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.protocol.tool_calls import ToolCallParser
from serve_app.protocol.tools import joined
from serve_app.tiny import CHECKPOINT

# Without U+FFFD and lone surrogates, which no answer can hold whole.
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=20
)
IDS = st.lists(st.integers(0, 2**15 - 1), min_size=1, max_size=30)
"""Ids of any vocabulary: tests take them modulo its size."""

RARE = "𓂀"
"""A character that no vocabulary here has: its four bytes are a token each."""


@pytest.fixture(scope="module", params=["tiny", "mixtral"])
def tokenizer(request: pytest.FixtureRequest, mixtral_folder: Path) -> Tokenizer:
    """Our tokenizer, with the tiny model's vocabulary and with Mixtral's."""
    return Tokenizer(CHECKPOINT if request.param == "tiny" else mixtral_folder)


@pytest.fixture(scope="module")
def transformers_tokenizer(tokenizer: Tokenizer, mixtral_folder: Path) -> Any:
    """transformers' tokenizer for the same files."""
    from transformers import AutoTokenizer

    is_tiny = tokenizer.backend.get_vocab_size() == 768
    return AutoTokenizer.from_pretrained(CHECKPOINT if is_tiny else mixtral_folder)


NONE = np.empty(0, np.int64), np.empty(0, np.float32)


def groups(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """Returns `ids` cut at the given places."""
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in pairwise(places)]


def streamed(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], stops: list[str] | None = None
) -> list[TextDelta]:
    """Returns the text of an answer whose engine deltas are `ids` cut at `cuts`."""
    stream = TextStream(Detokenizer(tokenizer.backend), stops or [])
    deltas = []
    for group in groups(ids, cuts):
        deltas.append(stream.push(group, [TokenLogprob(id, -1.0, *NONE) for id in group]))
        if deltas[-1].finish_reason is not None:
            return deltas
    return [*deltas, stream.push([], [], "length")]


@given(TEXTS, st.lists(st.integers(0, 100), max_size=6))
def test_streamed_text_is_the_decoders(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str, cuts: list[int]
) -> None:
    """The pieces join to what transformers decodes at once; none has a broken character. A text
    may be the name of a special token, which is no text of an answer."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [delta.text for delta in streamed(tokenizer, ids, cuts)]
    assert "".join(pieces) == transformers_tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@given(IDS, st.lists(st.integers(0, 100), max_size=6), st.lists(st.text("ab ", min_size=1)))
def test_any_delta_sizes_give_the_same_answer(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], stops: list[str]
) -> None:
    """Text, scores, reason and count of any tokens, valid text or not, do not depend on deltas."""
    ids = [token_id % tokenizer.backend.get_vocab_size() for token_id in ids]
    by_one, by_cuts = (
        streamed(tokenizer, ids, list(range(len(ids))), stops),
        streamed(tokenizer, ids, cuts, stops),
    )

    def whole(deltas: list[TextDelta]) -> tuple[str, list[TokenScore], str | None, int]:
        text = "".join(delta.text for delta in deltas)
        scores = [score for delta in deltas for score in delta.scores]
        return text, scores, deltas[-1].finish_reason, deltas[-1].num_tokens

    assert whole(by_one) == whole(by_cuts)


@given(TEXTS, TEXTS)
@settings(max_examples=50)
def test_a_continuation_is_the_rest_of_the_text(
    tokenizer: Tokenizer, start: str, rest: str
) -> None:
    """Prompt and answer of a completion join to the text, spaces included."""
    ids, more = (tokenizer.encode(each, add_special_tokens=False) for each in (start, rest))
    stream = TextStream(Detokenizer(tokenizer.backend, prompt_ids=ids))
    answer = stream.push(more).text + stream.push([], [], "stop").text
    assert tokenizer.decode(ids) + answer == tokenizer.decode(ids + more)


def test_an_incomplete_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    """Bytes that no token completes become U+FFFD, and only when nothing more comes."""
    character = tokenizer.encode(RARE, add_special_tokens=False)[1:]
    stream = TextStream(Detokenizer(tokenizer.backend))
    assert stream.push(character[:2]).text == ""
    assert set(stream.push([], [], "length").text) == {"\ufffd"}


def test_broken_bytes_do_not_end_the_answer(tokenizer: Tokenizer) -> None:
    """A character that breaks off in the middle costs that character and nothing after it."""
    character = tokenizer.encode(RARE, add_special_tokens=False)[1:]
    after = tokenizer.encode("is fine too", add_special_tokens=False)
    stream = TextStream(Detokenizer(tokenizer.backend))
    text = stream.push([*character, *character[:2], *after]).text
    assert text.startswith(f"{RARE}\ufffd")
    assert text.endswith(" is fine too")


def test_special_tokens_are_not_shown_unless_asked(tokenizer: Tokenizer) -> None:
    """`</s>` in an answer is no text; with skip_special_tokens false it is."""
    ids = [*tokenizer.encode("a b", add_special_tokens=False), 2]
    shown = TextStream(Detokenizer(tokenizer.backend, skip_special=False))
    assert TextStream(Detokenizer(tokenizer.backend)).push(ids).text == "a b"
    assert shown.push(ids).text == "a b</s>"


def test_no_stop_string_before_min_tokens(tokenizer: Tokenizer) -> None:
    """A stop string within the first min_tokens tokens is text like any other."""
    ids = tokenizer.encode("no no no", add_special_tokens=False)
    number = len(tokenizer.encode("no no", add_special_tokens=False))
    stream = TextStream(Detokenizer(tokenizer.backend), [" no"], min_tokens=number + 1)
    delta = stream.push(ids)
    assert (delta.text, delta.finish_reason) == ("no no", "stop")


def test_a_stop_string_over_the_edge_of_min_tokens(tokenizer: Tokenizer) -> None:
    """A stop string that ends after min_tokens stops: its beginning was shown, its rest is not."""
    ids = tokenizer.encode("a b c", add_special_tokens=False)
    number = len(tokenizer.encode("a b", add_special_tokens=False))
    stream = TextStream(Detokenizer(tokenizer.backend), ["b c"], min_tokens=number + 1)
    deltas = [stream.push([token]) for token in ids]
    assert "".join(delta.text for delta in deltas) == "a b"
    assert deltas[-1].finish_reason == "stop"


def test_scores_of_a_cut_token_are_dropped(tokenizer: Tokenizer) -> None:
    """With a stop string, the scores are those of the tokens whose text is in the answer."""
    ids = tokenizer.encode("one two", add_special_tokens=False)
    whole = streamed(tokenizer, ids, [])[0]
    cut = streamed(tokenizer, ids, [], [" two"])[0]
    assert cut.text == "one"
    assert cut.finish_reason == "stop"
    assert cut.scores == [score for score in whole.scores if score.offset < len("one")]
    assert 0 < len(cut.scores) < len(ids)


def test_tool_calls_are_taken_out_of_the_text() -> None:
    """The text before calls stays text, the pieces of a call come as they are generated, and the
    answer ends with `tool_calls`; what stop strings cut is no call."""
    ours = Tokenizer(CHECKPOINT)
    answer = 'I look.\n[TOOL_CALLS] [{"name": "f", "arguments": {"city": "Paris"}}]'
    ids = ours.encode(answer, add_special_tokens=False)
    for stops, arguments, reason in (
        ((), '{"city": "Paris"}', "tool_calls"),
        (("aris",), '{"city": "P', "stop"),
    ):
        stream = TextStream(Detokenizer(ours.backend), stops, tool_calls=ToolCallParser({"f"}))
        deltas = [stream.push([token_id]) for token_id in ids]
        deltas.append(stream.push([], (), "stop"))
        (call,) = joined(piece for delta in deltas for piece in delta.tool_calls)
        assert "".join(delta.text for delta in deltas) == "I look."
        assert (call.name, call.arguments) == ("f", arguments)
        assert deltas[-1].finish_reason == reason
