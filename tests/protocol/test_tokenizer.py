"""Prompts become the ids that transformers makes of them."""

import asyncio
from typing import Any

import pytest

from serve_app.tiny import CHECKPOINT
from tests.fakes import tokenizer

CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 3?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "é你🙂\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": " c "},
    ],
]


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' tokenizer for the same files."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINT, local_files_only=True)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_conversations_are_what_transformers_makes(
    reference: Any, conversation: list[dict[str, str]]
) -> None:
    """The ids are apply_chat_template's own, with one BOS in front."""
    ids = tokenizer().render(conversation)
    expected = reference.apply_chat_template(conversation, add_generation_prompt=True)
    assert ids == expected["input_ids"]
    assert ids.count(reference.bos_token_id) == 1


@pytest.mark.parametrize("text", ["Hello", " x", "é你🙂", "<s>Hello", ""])
def test_text_gets_one_bos(reference: Any, text: str) -> None:
    """Raw text is encoded as transformers does, except that a BOS in the text is not doubled."""
    expected = reference.encode(text.removeprefix("<s>"))
    assert tokenizer().encode(text)[0] == reference.bos_token_id
    assert tokenizer().encode(text).count(reference.bos_token_id) == 1
    if not text.startswith("<s>"):
        assert tokenizer().encode(text) == expected


def test_the_bytes_of_tokens_make_up_the_text() -> None:
    """Token by token, byte tokens included, the bytes are those of the text."""
    ids = tokenizer().encode("a €🙂b", add_special_tokens=False)
    assert b"".join(map(tokenizer().token_bytes, ids)).decode() == " a €🙂b"


def test_a_long_text_leaves_the_event_loop_alone() -> None:
    """Tokenizing in a thread releases the interpreter, so that the loop turns meanwhile."""

    async def num_turns() -> int:
        """Returns how many turns the event loop makes meanwhile."""
        task = asyncio.create_task(asyncio.to_thread(tokenizer().encode, "é" * 300_000))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    # A thread that held the lock for the whole text would leave it a few.
    assert asyncio.run(num_turns()) > 1000
