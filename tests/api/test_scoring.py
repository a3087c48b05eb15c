"""Likelihood requests: `echo` with `logprobs`, `prompt_logprobs`, `max_tokens: 0`.

The numbers are compared with transformers' logits of the same checkpoint in float32.
"""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types import Completion

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.protocol import json_pieces, values
from serve_app.tiny import CHECKPOINT
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine, answer, chunks, server

TEXT = "/v1/completions"
PROMPTS = ["The capital of France is Paris.", "Grüße, 世界 🌍", "2 + 3 = 5", "a"]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    """The real tiny model."""
    real = MixtralServer(Settings.from_yaml("configs/tiny.yaml"))
    yield real
    real.close()


@pytest.fixture(scope="module")
def oracle() -> Any:
    """The same model in transformers, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def expected(oracle: Any, ids: list[int]) -> torch.Tensor:
    """Returns the log probabilities `[tokens - 1, vocab]` of each next token."""
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1)


def without_first_scores(whole: Any) -> Any:
    choices = [
        choice | {"logprobs": {name: values[1:] for name, values in choice["logprobs"].items()}}
        for choice in whole["choices"]
    ]
    return whole | {"choices": choices}


def ask(tiny: MixtralServer, body: dict[str, Any], path: str = TEXT) -> Any:
    whole = asyncio.run(answer(tiny, path, body))
    assert "error" not in whole, whole
    return whole


@pytest.mark.parametrize("as_ids", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_lm_evals_requests_get_transformers_numbers(
    tiny: MixtralServer, oracle: Any, as_ids: bool, max_tokens: int
) -> None:
    """A batch of contexts with continuations, as lm_eval sends and reads them: the sum of a
    continuation's log probabilities, and whether it is what the model would say."""
    ids = [tiny.tokenizer.encode(prompt) for prompt in PROMPTS]
    body = {"prompt": ids if as_ids else PROMPTS, "max_tokens": max_tokens, "logprobs": 1}
    whole = ask(tiny, {**body, **GREEDY, "echo": True, "seed": 1234})
    # OpenAI sends null for the first token, which its client's models do not have.
    Completion.model_validate(without_first_scores(whole), strict=True)
    assert whole["usage"]["prompt_tokens"] == sum(map(len, ids))
    for prompt, tokens, choice in zip(PROMPTS, ids, whole["choices"], strict=True):
        logprobs = choice["logprobs"]
        end = -1 if max_tokens else None
        wanted = expected(oracle, tokens)
        own = wanted.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:end] == pytest.approx(own.tolist(), abs=1e-4)
        greedy = [
            value == max(top.values())
            for value, top in zip(
                logprobs["token_logprobs"][1:end], logprobs["top_logprobs"][1:end], strict=True
            )
        ]
        assert greedy == (wanted.argmax(-1) == torch.tensor(tokens[1:])).tolist()
        assert choice["text"].startswith(prompt)
        assert {len(each) for each in logprobs.values()} == {len(tokens) + max_tokens}
        if not max_tokens:
            assert (choice["text"], choice["finish_reason"]) == (prompt, "length")


def test_offsets_of_an_echo_fit_its_text(tiny: MixtralServer) -> None:
    """Each token stands in the text of prompt and answer where its offset says."""
    prompt = "Hello there. 2 + 3"
    whole = ask(
        tiny,
        {
            "prompt": prompt,
            "max_tokens": 5,
            "logprobs": 0,
            "echo": True,
            "ignore_eos": True,
            **GREEDY,
        },
    )
    (choice,) = whole["choices"]
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(prompt)
    for token, offset in zip(logprobs["tokens"][2:], logprobs["text_offset"][2:], strict=True):
        assert token == "</s>" or choice["text"][offset:].startswith(token)
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


@pytest.mark.parametrize("prompt", ["Hello there. " * 40, [5], "a"])
@pytest.mark.parametrize(
    "fields", [{"max_tokens": 0}, {"max_tokens": 4}, {"max_tokens": 3, "n": 2}]
)
def test_a_streamed_echo_is_the_whole_one(
    tiny: MixtralServer, prompt: Any, fields: dict[str, Any]
) -> None:
    """The chunks join to the whole answer's text and scores; no chunk has many scores."""
    body = {"prompt": prompt, "logprobs": 2, "echo": True, **GREEDY, **fields}
    whole = ask(tiny, body)
    streamed = asyncio.run(chunks(tiny, TEXT, body))
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in streamed if c["choices"][0]["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        scored = [each["logprobs"] for each in own if each["logprobs"] is not None]
        assert max(len(each["tokens"]) for each in scored) <= 50
        for field, values_ in choice["logprobs"].items():
            assert [value for each in scored for value in each[field]] == values_


@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions"])
def test_prompt_logprobs_are_vllms(tiny: MixtralServer, oracle: Any, path: str) -> None:
    """By token id: log probability, rank and text, of the prompt's token and the best ones."""
    if path == TEXT:
        ids = tiny.tokenizer.encode(PROMPTS[0])
        body: dict[str, Any] = {"prompt": PROMPTS[0], "max_tokens": 0}
    else:
        turns = [{"role": "user", "content": "Hello"}]
        ids = tiny.tokenizer.render(turns)
        body = {"messages": turns, "max_tokens": 1, "top_logprobs": 1, "logprobs": True}
    whole = ask(tiny, {**body, **GREEDY, "prompt_logprobs": 3}, path)
    found = (whole["choices"][0] if path == TEXT else whole)["prompt_logprobs"]
    wanted = expected(oracle, ids)
    assert found[0] is None
    assert len(found) == len(ids)
    for position, (token, entries) in enumerate(zip(ids[1:], found[1:], strict=True)):
        row = wanted[position]
        assert str(token) in entries
        assert 3 <= len(entries) <= 4
        for name, entry in entries.items():
            assert entry["logprob"] == pytest.approx(row[int(name)].item(), abs=1e-4)
            assert entry["rank"] == int((row > row[int(name)]).sum()) + 1
            assert entry["decoded_token"] == tiny.tokenizer.token_bytes(int(name)).decode(
                errors="replace"
            )


def test_each_choice_has_the_scores_of_its_prompt(tiny: MixtralServer) -> None:
    """With several prompts and several answers to each, best_of included."""
    body = {"prompt": ["Hello", "2 + 3"], "max_tokens": 3, "logprobs": 1, "echo": True, "seed": 3}
    ones = [ask(tiny, {**body, "prompt": prompt, "n": 1}) for prompt in body["prompt"]]  # type: ignore[attr-defined]
    for more in ({"n": 2}, {"n": 2, "best_of": 3}):
        whole = ask(tiny, {**body, **more})
        for index, choice in enumerate(whole["choices"]):
            alone = ones[index // 2]["choices"][0]["logprobs"]
            size = ones[index // 2]["usage"]["prompt_tokens"]
            for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert choice["logprobs"][field][:size] == alone[field][:size]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": ["a b c " * 100] * 256, "echo": True, "logprobs": 20}, "logprobs"),
        ({"prompt": ["a b c " * 100] * 256, "prompt_logprobs": 20}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    """Nothing has run then. The limit counts the tokens of the prompts."""
    engine = FakeEngine()
    error = asyncio.run(answer(server(engine), TEXT, body))["error"]
    assert (error["param"], engine.requests) == (param, [])


def test_openais_client_gets_twenty_log_probabilities(endpoint: Endpoint) -> None:
    """`logprobs: 20` and `max_tokens: 0` are fine for OpenAI's client."""
    with endpoint.client() as client:
        whole = client.completions.create(model="tiny", prompt="Hi", logprobs=20)
        with pytest.raises(openai.BadRequestError, match="echo"):
            client.completions.create(model="tiny", prompt="Hi", max_tokens=0)
    assert whole.choices[0].logprobs is not None


def test_a_large_answer_is_the_same_json(tiny: MixtralServer, running: Endpoint) -> None:
    """An answer with many log probabilities is encoded in pieces, over HTTP."""
    running.server = tiny
    body = {"prompt": ["Hello there. " * 5] * 12, "logprobs": 20, "echo": True, "max_tokens": 20}
    body |= {"temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=running.url, timeout=60) as http:
        response = http.post(TEXT, json=body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    whole = ask(tiny, body)
    assert values.is_large(whole)
    assert response.json()["choices"] == whole["choices"]
    assert json.loads(json_pieces.encode(whole)) == whole
