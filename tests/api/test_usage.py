"""`usage.prompt_tokens_details.cached_tokens` and `system_fingerprint`."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from openai.types.chat import ChatCompletion

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.fakes import answer, chunks, server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BLOCK = 16


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    """The real tiny model, with KV blocks of 16 tokens."""
    settings = Settings.from_yaml("configs/tiny.yaml")
    assert settings.engine.block_size == BLOCK
    real = MixtralServer(settings)
    yield real
    real.close()


def cached(body: dict[str, Any]) -> int:
    return int(body["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_cached_tokens_are_the_hits_of_the_prefix_cache(tiny: MixtralServer) -> None:
    """None at first, then all full blocks, streamed or not; a prompt counts once whatever `n`."""
    body = {"prompt": "cached tokens are counted " * 8, "temperature": 0, "max_tokens": 2}

    async def ask() -> None:
        first = await answer(tiny, TEXT, body)
        whole = (first["usage"]["prompt_tokens"] - 1) // BLOCK * BLOCK
        assert whole >= 3 * BLOCK
        assert cached(first) == 0
        assert cached(await answer(tiny, TEXT, body)) == whole
        assert cached(await answer(tiny, TEXT, {**body, "n": 3})) == whole
        twice = {**body, "prompt": [body["prompt"], body["prompt"]]}
        assert cached(await answer(tiny, TEXT, twice)) == 2 * whole
        for more in ({}, {"n": 2}):
            options = {"stream_options": {"include_usage": True}}
            assert cached((await chunks(tiny, TEXT, {**body, **options, **more}))[-1]) == whole
        scored = {**body, "echo": True, "logprobs": 0}
        assert cached(await answer(tiny, TEXT, scored)) == 0

    asyncio.run(ask())


def test_a_conversation_that_goes_on_is_cached(tiny: MixtralServer) -> None:
    """In chats too; OpenAI's models read it."""
    messages = [{"role": "user", "content": "Name the colours of the rainbow, please. " * 4}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 4}

    async def ask() -> tuple[Any, Any]:
        return await answer(tiny, CHAT, body), await answer(tiny, CHAT, body)

    bodies = asyncio.run(ask())
    first, second = (ChatCompletion.model_validate(each, strict=True) for each in bodies)
    for each, has_hits in ((first, False), (second, True)):
        assert each.usage is not None
        assert each.usage.prompt_tokens_details is not None
        assert (each.usage.prompt_tokens_details.cached_tokens or 0) >= BLOCK * has_hits
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0


def test_the_fingerprint_stands_for_model_and_version() -> None:
    """Whole and streamed answers have the same one; another revision or format has another."""
    one, other = server(), server(None, model={"name": "tiny", "revision": "b"})
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}

    async def ask(at: MixtralServer) -> set[str]:
        found = [
            await answer(at, CHAT, chat),
            await answer(at, TEXT, {"prompt": "a"}),
            *await chunks(at, CHAT, chat),
            *await chunks(at, TEXT, {"prompt": "a"}),
        ]
        return {each["system_fingerprint"] for each in found}

    (mine,), (again,), (others,) = (asyncio.run(ask(at)) for at in (one, server(), other))
    assert mine == again != others
    assert mine.startswith("fp_")
