"""`n` and `best_of`: several answers to one prompt, over HTTP and as data."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.api.conftest import Endpoint
from tests.fakes import MAX_TAKEN, FakeEngine, answer, chunks, items, server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ROUTES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": [{"role": "user", "content": "Hello"}]}),
    (TEXT, {"prompt": "Hi"}),
]
WARM = {"temperature": 2.0, "seed": 11, "max_tokens": 12}


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    """The real tiny model."""
    real = MixtralServer(Settings.from_yaml("configs/tiny.yaml"))
    yield real
    real.close()


def counts(body: dict[str, Any]) -> Any:
    """Returns the usage without what the prefix cache had of it."""
    return {k: v for k, v in body["usage"].items() if k != "prompt_tokens_details"}


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_choices_differ_and_the_first_is_that_of_one(
    tiny: MixtralServer, path: str, body: dict[str, Any]
) -> None:
    """With a seed, choice i is the answer to the seed + i; the prompt is counted once."""

    async def ask() -> tuple[Any, list[Any]]:
        whole = await answer(tiny, path, {**body, **WARM, "n": 4})
        seeds = range(11, 15)
        ones = [await answer(tiny, path, {**body, **WARM, "seed": seed}) for seed in seeds]
        return whole, ones

    whole, ones = asyncio.run(ask())
    texts = [text_of(choice) for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts == [text_of(one["choices"][0]) for one in ones]
    assert len(set(texts)) > 1
    usage = whole["usage"]
    assert usage["prompt_tokens"] == ones[0]["usage"]["prompt_tokens"]
    assert usage["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in ones)


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_stream_has_the_choices_of_the_whole_answer(
    tiny: MixtralServer, path: str, body: dict[str, Any]
) -> None:
    """Joined by their index the chunks are the whole answer; usage comes once, at the end."""
    asked = {**body, **WARM, "n": 3}
    options = {"include_usage": True}

    async def ask() -> tuple[Any, list[Any]]:
        whole = await answer(tiny, path, asked)
        return whole, await chunks(tiny, path, {**asked, "stream_options": options})

    whole, streamed = asyncio.run(ask())
    texts: defaultdict[int, str] = defaultdict(str)
    reasons = {}
    for chunk in streamed[:-1]:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice.get("text", choice.get("delta", {}).get("content", ""))
        if choice["finish_reason"] is not None:
            reasons[choice["index"]] = choice["finish_reason"]
    assert [texts[index] for index in range(3)] == [text_of(each) for each in whole["choices"]]
    assert [reasons[i] for i in range(3)] == [each["finish_reason"] for each in whole["choices"]]
    assert (streamed[-1]["choices"], counts(streamed[-1])) == ([], counts(whole))


def test_several_prompts_with_several_answers(tiny: MixtralServer) -> None:
    """Choices stand prompt by prompt, n for each."""

    async def ask() -> tuple[Any, list[Any]]:
        whole = await answer(tiny, TEXT, {"prompt": ["Hi", "2 + 3"], **WARM, "n": 2, "echo": True})
        ones = [
            await answer(tiny, TEXT, {"prompt": prompt, **WARM, "seed": seed, "echo": True})
            for prompt in ("Hi", "2 + 3")
            for seed in (11, 12)
        ]
        return whole, ones

    whole, ones = asyncio.run(ask())
    assert [each["text"] for each in whole["choices"]] == [o["choices"][0]["text"] for o in ones]
    prompt_tokens = ones[0]["usage"]["prompt_tokens"] + ones[2]["usage"]["prompt_tokens"]
    assert whole["usage"]["prompt_tokens"] == prompt_tokens


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_best_of_returns_the_answers_of_the_highest_mean_logprob(
    tiny: MixtralServer, path: str, body: dict[str, Any]
) -> None:
    """The best 2 of 6, best first; the tokens of all are counted; no log probabilities are sent
    that were not asked for."""
    is_chat = path == CHAT
    scored: dict[str, Any] = {"logprobs": True if is_chat else 0}

    def mean(choice: dict[str, Any]) -> float:
        found = choice["logprobs"]
        each = [t["logprob"] for t in found["content"]] if is_chat else found["token_logprobs"]
        return float(sum(each)) / len(each)

    async def ask() -> tuple[Any, Any]:
        every = await answer(tiny, path, {**body, **WARM, **scored, "n": 6})
        return every, await answer(tiny, path, {**body, **WARM, "n": 2, "best_of": 6})

    every, best = asyncio.run(ask())
    ranked = sorted(every["choices"], key=mean, reverse=True)
    assert [text_of(each) for each in best["choices"]] == [text_of(each) for each in ranked[:2]]
    assert [each["index"] for each in best["choices"]] == [0, 1]
    assert all(each["logprobs"] is None for each in best["choices"])
    assert counts(best) == counts(every)


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_several_answers_are_refused_as_a_whole(path: str, body: dict[str, Any]) -> None:
    """If the queue is full, the request gets one 429 for all its answers, and none has run."""
    engine = FakeEngine()
    engine.num_taken = MAX_TAKEN
    for more in ({}, {"stream": True}):
        (item,) = asyncio.run(items(server(engine), path, {**body, "n": 3, **more}))
        assert (item["status"], item["error"]["error"]["code"]) == (429, "queue_full")
    assert (engine.requests, engine.num_taken) == ([], MAX_TAKEN)


def test_more_answers_than_the_batch_holds_wait_for_places() -> None:
    """128 answers take one place of the queue, and no more run at once than the batch holds."""
    engine = FakeEngine()
    one = server(engine)
    whole = asyncio.run(answer(one, CHAT, {**ROUTES[0][1], "n": 128}))
    assert len(whole["choices"]) == 128
    assert engine.max_num_seqs == 32
    assert engine.num_taken == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {**ROUTES[0][1], "logprobs": True, "top_logprobs": 20, "n": 64}, "top_logprobs"),
        (TEXT, {"prompt": ["a"] * 64, "logprobs": 20, "n": 4, "max_tokens": 256}, "logprobs"),
    ],
)
def test_the_limit_of_log_probabilities_counts_every_answer(
    path: str, body: dict[str, Any], param: str
) -> None:
    """A number of log probabilities that is allowed for one answer is refused for several."""
    engine = FakeEngine()
    error = asyncio.run(answer(server(engine), path, body))["error"]
    assert (error["param"], engine.requests) == (param, [])
    assert "error" not in asyncio.run(answer(server(), path, {**body, "n": 1}))


def test_the_openai_client_reads_choices(endpoint: Endpoint) -> None:
    """OpenAI's own models, whole and streamed."""
    with endpoint.client() as client:
        messages: Any = ROUTES[0][1]["messages"]
        whole = client.chat.completions.create(model="tiny", messages=messages, n=2)
        streamed = list(
            client.chat.completions.create(model="tiny", messages=messages, n=2, stream=True)
        )
        text = client.completions.create(model="tiny", prompt="Hi", n=2, best_of=3)
        with pytest.raises(openai.BadRequestError, match="best_of"):
            client.completions.create(model="tiny", prompt="Hi", n=2, best_of=3, stream=True)
    ChatCompletion.model_validate(whole.model_dump(), strict=True)
    Completion.model_validate(text.model_dump(), strict=True)
    for chunk in streamed:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert {choice.index for chunk in streamed for choice in chunk.choices} == {0, 1}
