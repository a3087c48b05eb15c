"""Prompts become the ids that transformers makes of them."""

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.protocol.tokenizer import Tokenizer
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
    """Raw text is encoded as transformers does, save that a BOS in the text is not doubled."""
    expected = reference.encode(text.removeprefix("<s>"))
    assert tokenizer().encode(text)[0] == reference.bos_token_id
    assert tokenizer().encode(text).count(reference.bos_token_id) == 1
    if not text.startswith("<s>"):
        assert tokenizer().encode(text) == expected


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None]
)
def test_it_is_the_one_that_autotokenizer_takes(tmp_path: Path, name: str | None) -> None:
    """Tokenizer, template and tokens are the same for any class that a checkpoint names."""
    from transformers import AutoTokenizer

    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["tokenizer_class"]
    file.write_text(json.dumps(config if name is None else {**config, "tokenizer_class": name}))
    auto = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = Tokenizer(tmp_path)
    assert type(ours._tokenizer) is type(auto)
    assert ours.backend.to_str() == auto.backend_tokenizer.to_str()
    assert ours._tokenizer.chat_template == auto.chat_template
    assert ours._tokenizer.special_tokens_map == auto.special_tokens_map


def test_what_the_template_refuses_is_a_bad_request() -> None:
    """Roles that do not alternate are refused in the template's own words."""
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InvalidRequest, match="alternate") as refused:
        tokenizer().render(turns)
    assert refused.value.param == "messages"


def test_the_bytes_of_tokens_make_up_the_text() -> None:
    """Token by token, byte tokens included, the bytes are those of the text."""
    ids = tokenizer().encode("a €🙂b", add_special_tokens=False)
    assert b"".join(map(tokenizer().token_bytes, ids)).decode() == " a €🙂b"


def test_a_long_text_leaves_the_event_loop_alone() -> None:
    """Tokenizing in a thread releases the interpreter, so that the loop turns meanwhile."""

    async def longest_pause() -> float:
        """The longest pause of the event loop, as a share of the work's time."""
        started = last = time.monotonic()
        longest = 0.0
        task = asyncio.create_task(asyncio.to_thread(tokenizer().encode, "é" * 300_000))
        while not task.done():
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - last)
            last = time.monotonic()
        return longest / (last - started)

    # Holding the lock for the whole text would make it nearly 1.
    assert asyncio.run(longest_pause()) < 0.5
