"""`continue_final_message` and `add_generation_prompt`: transformers' prompts, and the answers."""

import asyncio
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.chat import ChatRequest
from serve_app.protocol.chat_template import cut_behind
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.tiny import CHECKPOINT
from tests.fakes import FakeEngine, answer, server

CHAT = "/v1/chat/completions"
TURNS = [
    {"role": "user", "content": "Spell cat."},
    {"role": "assistant", "content": "C, A,"},
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}|{% endfor %}"


def prompt_of(body: dict[str, Any]) -> list[int]:
    """Returns the prompt that the engine gets."""
    engine = FakeEngine()
    found = asyncio.run(answer(server(engine), CHAT, body))
    assert "error" not in found, found
    return engine.requests[0][0]


@pytest.mark.parametrize(
    "how",
    [
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {},
    ],
)
@pytest.mark.parametrize("content", ["C, A,", "  C, A,  ", "Spell cat.", "a\n\nb "])
def test_prompts_are_those_of_transformers(how: dict[str, bool], content: str) -> None:
    """With both fields as vLLM passes them on, whatever spaces the message has."""
    from transformers import AutoTokenizer

    oracle: Any = AutoTokenizer.from_pretrained(CHECKPOINT)
    turns = [TURNS[0], {"role": "assistant", "content": content}]
    flags = {"add_generation_prompt": not how.get("continue_final_message", False)} | how
    expected = oracle.apply_chat_template(turns, tokenize=True, return_dict=False, **flags)
    assert prompt_of({"messages": turns, **how}) == expected
    counted = asyncio.run(answer(server(), "/tokenize", {"messages": turns, **how}))
    assert counted["tokens"] == expected


def test_an_answer_that_continues_keeps_its_space() -> None:
    """Message and answer join to one text, whole and streamed."""
    engine = FakeEngine(" and T.")
    body = {"messages": TURNS, "continue_final_message": True, "add_generation_prompt": False}
    found = asyncio.run(answer(server(engine), CHAT, body))
    assert found["choices"][0]["message"]["content"] == " and T."


@pytest.mark.parametrize(
    "how",
    [
        {"continue_final_message": True, "add_generation_prompt": True},
        {"continue_final_message": "yes"},
        {"add_generation_prompt": 1},
    ],
)
def test_what_does_not_fit_is_refused(how: dict[str, Any]) -> None:
    """Both at once contradict each other (as in vLLM)."""
    with pytest.raises(InvalidRequest) as caught:
        ChatRequest.read({"messages": TURNS, **how})
    assert caught.value.param in how


def test_an_empty_message_cannot_be_continued() -> None:
    """There would be nothing to find in the prompt."""
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        cut_behind("<s>[INST] a [/INST]</s>", " ")
    body = {"messages": [TURNS[0], {"role": "assistant", "content": ""}]}
    found = asyncio.run(answer(server(), CHAT, {**body, "continue_final_message": True}))
    assert found["error"]["param"] == "continue_final_message"


def test_control_tokens_in_the_continued_message_are_text() -> None:
    """A message that contains the end token is not cut there."""
    turns = [TURNS[0], {"role": "assistant", "content": "a </s> b"}]
    ids = prompt_of({"messages": turns, "continue_final_message": True})
    tokenizer = Tokenizer(CHECKPOINT)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).endswith("a </s> b")


@pytest.mark.parametrize("as_file", [True, False])
def test_a_custom_template_replaces_the_checkpoints(tmp_path: Any, as_file: bool) -> None:
    """By its path and by its text; the tokenizer's information has it too."""
    file = tmp_path / "template.jinja"
    file.write_text(TEMPLATE)
    given = str(file) if as_file else TEMPLATE
    tokenizer = Tokenizer(CHECKPOINT, custom_chat_template=given)
    assert tokenizer.info["chat_template"] == TEMPLATE
    ids = tokenizer.render(TURNS)
    assert tokenizer.decode(ids) == "<user>Spell cat.|<assistant>C, A,|"
    assert any("model.custom_chat_template" in note for note in tokenizer.notes)
