"""The tokenizer files: Mixtral's template and pipeline, and the same through every loader."""

import random
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from serve_app.tiny import CHECKPOINT
from tools.tiny import corpus
from tools.tiny.train import Encoder


@pytest.fixture(scope="module")
def auto() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


def conversation(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_template_renders_the_model_cards_format(auto: Any) -> None:
    """The prompt is what Mixtral 8x7B Instruct's model card prescribes, character for character."""
    messages = conversation("Instruction", "Model answer", "Follow-up instruction")
    assert auto.apply_chat_template(messages, tokenize=False) == (
        "<s> [INST] Instruction [/INST] Model answer</s> [INST] Follow-up instruction [/INST]"
    )


def test_system_message_joins_the_first_question(auto: Any) -> None:
    """A leading system message is put before the first question, as Mixtral's template does."""
    messages = [{"role": "system", "content": "Be kind."}, *conversation("Hi", "Hello", "Bye")]
    assert auto.apply_chat_template(messages, tokenize=False) == (
        "<s> [INST] Be kind.\n\nHi [/INST] Hello</s> [INST] Bye [/INST]"
    )


@pytest.mark.parametrize("roles", ["uu", "a", "uaa", "us", "sa", "ss", "ut"])
def test_template_refuses_other_orders(auto: Any, roles: str) -> None:
    """Roles that do not alternate, late system messages and unknown roles are errors."""
    names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    with pytest.raises(jinja2.exceptions.TemplateError):
        auto.apply_chat_template(messages, tokenize=False)


def test_tokens_of_the_template_begin_with_one_bos(auto: Any) -> None:
    """Tokenizing a rendered conversation adds no second `<s>`."""
    ids = auto.apply_chat_template(conversation("Hello!"), return_dict=False)
    assert ids.count(auto.bos_token_id) == 1
    assert ids[0] == auto.bos_token_id


def test_training_sees_the_tokens_that_serving_makes(auto: Any) -> None:
    """A trained dialogue has the very ids that the chat template gives, system message included."""
    encoder = Encoder(CHECKPOINT)
    for dialogue in corpus.training(200, seed=9):
        system = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
        messages = conversation(*(text for turn in dialogue.turns for text in turn))
        expected = auto.apply_chat_template(system + messages, return_dict=False)
        ids, labels, positions = encoder.encode(dialogue, random.Random(0))
        assert ids == expected
        assert len(ids) == len(labels) == len(positions)


@settings(max_examples=200)
@given(text=st.text(max_size=40).filter(lambda text: "▁" not in text))
def test_any_text_survives_in_both_loaders(auto: Any, raw: Tokenizer, text: str) -> None:
    """Whatever Unicode comes, bytes carry it there and back, whichever library reads the file."""
    text = f"a{text}"
    ids = raw.encode(text, add_special_tokens=False).ids
    assert auto(text, add_special_tokens=False).input_ids == ids
    assert raw.decode(ids, skip_special_tokens=False) == text


def test_digits_are_tokens_of_their_own(raw: Tokenizer) -> None:
    """A number is its digits, which is what lets so small a model add."""
    tokens = raw.encode("12345", add_special_tokens=False).tokens
    assert tokens == ["▁", "1", "2", "3", "4", "5"]


def test_characters_outside_ascii_stream_whole(raw: Tokenizer) -> None:
    """Byte tokens come out of a decoding stream only as whole characters."""
    text = "Schöne Grüße 🙂 你好"
    ids = raw.encode(text, add_special_tokens=False).ids
    stream = DecodeStream()
    pieces = [stream.step(raw, id) for id in ids]
    assert len(ids) > len(text)
    assert "".join(piece or "" for piece in pieces) == text
    assert not any("\ufffd" in (piece or "") for piece in pieces)
