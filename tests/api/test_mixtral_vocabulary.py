"""A whole server with Mixtral's own 32,000 entries, around 2 layers of random weights."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests import mistral
from tests.fakes import answer, chunks
from tests.model.driver import random_oracle

QUESTION = [{"role": "user", "content": "Say </s> 🙂 and\n    indent it"}]
CHAT = "/v1/chat/completions"
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def oracle() -> Any:
    """transformers' model with random weights, which seldom has two equally good tokens."""
    return random_oracle(vocab_size=32_000, num_hidden_layers=2)


@pytest.fixture(scope="module")
def mixtral(
    oracle: Any, mixtral_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MixtralServer]:
    """Our server with the same weights, in float32 on a CPU."""
    folder = shutil.copytree(mixtral_folder, tmp_path_factory.mktemp("server"), dirs_exist_ok=True)
    oracle.save_pretrained(folder)
    model = {"name": str(folder), "quantization": "none", "device": "cpu", "dtype": "float32"}
    engine = {"num_threads": 1}
    server = MixtralServer(Settings(model=model, engine=engine))
    yield server
    server.close()


@pytest.fixture(scope="module")
def expected(oracle: Any) -> list[int]:
    """The greedy answer of transformers to the prompt that Mistral's encoder makes."""
    prompt = mistral.ids(QUESTION)
    whole = oracle.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS, eos_token_id=-1
    )
    ids: list[int] = whole[0, len(prompt) :].tolist()
    return ids


def body(**fields: Any) -> dict[str, Any]:
    how = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return {"messages": QUESTION, **how, **fields}


def ask(server: MixtralServer, **fields: Any) -> dict[str, Any]:
    return asyncio.run(answer(server, CHAT, body(**fields)))


def content(reply: dict[str, Any]) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def test_an_answer_is_what_mistral_and_transformers_make(
    mixtral: MixtralServer, expected: list[int]
) -> None:
    """Mistral's ids in, transformers' greedy tokens out, and SentencePiece's text of them."""
    reply = ask(mixtral)
    assert content(reply) == mistral.sentencepiece().decode(expected)
    assert reply["usage"]["prompt_tokens"] == len(mistral.ids(QUESTION))
    assert reply["usage"]["completion_tokens"] == NUM_TOKENS


def test_a_stream_has_the_same_text_and_no_broken_character(mixtral: MixtralServer) -> None:
    """Streamed text joins to the whole text, and byte tokens arrive as whole characters."""
    parts = [
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in asyncio.run(chunks(mixtral, CHAT, body()))
    ]
    whole = content(ask(mixtral))
    assert "".join(parts) == whole
    assert len(parts) > 2


def test_a_stop_string_ends_the_answer(mixtral: MixtralServer) -> None:
    """A stop string that lies across tokens of the real vocabulary is found and not shown."""
    whole = content(ask(mixtral))
    stop = whole[10:16]
    reply = ask(mixtral, stop=[stop])
    assert content(reply) == whole[: whole.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"
    streamed = asyncio.run(chunks(mixtral, CHAT, body(stop=[stop])))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in streamed)
    assert text == whole[: whole.index(stop)]


def test_the_bytes_of_logprobs_make_up_the_text(mixtral: MixtralServer) -> None:
    """The bytes of all tokens, joined, are those of the answer."""
    reply = ask(mixtral, logprobs=True)
    tokens = reply["choices"][0]["logprobs"]["content"]
    joined = b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")
    assert joined.removeprefix(" ") == content(reply)
    assert len(tokens) == NUM_TOKENS


def test_ids_come_back_as_text(mixtral: MixtralServer) -> None:
    """/tokenize has Mistral's ids, and /detokenize the text with its control tokens."""
    asked = {"messages": QUESTION, "return_token_strs": True}
    tokenized = asyncio.run(answer(mixtral, "/tokenize", asked))
    assert tokenized["tokens"] == mistral.ids(QUESTION)
    assert tokenized["token_strs"].count("</s>") == 0
    text = asyncio.run(answer(mixtral, "/detokenize", {"tokens": tokenized["tokens"]}))["prompt"]
    assert text == f"<s> [INST] {QUESTION[0]['content']} [/INST]"


ORDERS = {
    "two system messages": ("system", "system", "user"),
    "a late system message": ("user", "assistant", "system", "user"),
    "neighbors": ("user", "user", "assistant", "assistant", "user"),
    "a first answer": ("assistant", "user"),
    "all of them": ("system", "assistant", "system", "user", "user", "assistant", "user"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_frameworks_conversations_are_answered(mixtral: MixtralServer, order: str) -> None:
    """Conversations in any order are answered, and have the tokens of Mistral's encoder."""
    turns = [{"role": role, "content": f"Number {i}."} for i, role in enumerate(ORDERS[order])]
    for path in (CHAT, "/prompt"):
        asked = {"messages": turns, "max_tokens": 2}
        reply = asyncio.run(answer(mixtral, path, asked))
        assert reply["usage"]["prompt_tokens"] == len(mistral.ids(turns))
