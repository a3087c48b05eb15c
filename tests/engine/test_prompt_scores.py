"""Log probabilities of prompts: transformers' numbers, whatever steps and blocks they come from."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from serve_app.engine import scheduler
from serve_app.engine.engine import Engine
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import ContextLengthExceeded
from tests.engine.fake import FakeRunner, complete, config, greedy, repeat, run, running
from tests.engine.mixtral import BLOCK_SIZE, Pair, prompts, serving

NUM_TOP = 5
SCORE = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=NUM_TOP)


async def scores(engine: Engine, prompt: list[int], params: SamplingParams = SCORE) -> Any:
    """Returns the deltas of one request, joined into one."""
    whole = None
    async for delta in engine.generate(prompt, params):
        if whole is None:
            whole = delta
        else:
            whole.extend(delta)
    return whole


def all_scores(engine: Engine, some: list[list[int]], params: SamplingParams = SCORE) -> list[Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*(scores(engine, prompt, params) for prompt in some))

    return run(gather())


def assert_transformers(pair: Pair, prompt: list[int], delta: Any) -> None:
    """Asserts that the numbers of `delta` are those of transformers' logits for `prompt`."""
    parts = delta.prompt_logprobs
    assert [token_id for part in parts for token_id in part.token_ids] == prompt[1:]
    if not parts:
        assert len(prompt) == 1
        return
    with torch.inference_mode():
        logits = pair.oracle(torch.tensor([prompt])).logits[0, :-1]
    expected = logits.float().log_softmax(-1)
    chosen = expected.gather(1, torch.tensor(prompt[1:])[:, None])
    found = np.concatenate([part.logprobs for part in parts])
    assert found == pytest.approx(chosen[:, 0].numpy(), abs=1e-4)
    top = np.concatenate([part.top_logprobs for part in parts])
    assert top == pytest.approx(expected.topk(NUM_TOP).values.numpy(), abs=1e-4)
    top_ids = np.concatenate([part.top_ids for part in parts])
    own = expected.gather(1, torch.from_numpy(top_ids)).numpy()
    assert own == pytest.approx(top, abs=1e-4)
    ranks = np.concatenate([part.ranks for part in parts])
    clear = (expected - chosen).abs().topk(2, largest=False).values[:, 1] > 1e-4
    expected_ranks = ((expected > chosen).sum(-1) + 1).numpy()
    assert (ranks == expected_ranks)[clear.numpy()].all()


@pytest.mark.parametrize("can_overlap_steps", [False, True])
@pytest.mark.parametrize("tokens", [32, 512])
@pytest.mark.parametrize("num_blocks", [512, 60])
def test_scores_are_those_of_transformers(
    pair: Pair, can_overlap_steps: bool, tokens: int, num_blocks: int
) -> None:
    """Scores equal transformers' log probabilities: in one chunk, in many, with preemptions, and
    with cached prefixes, in both modes of the engine's loop."""
    some = [*prompts(12, seed=21), prompts(1, seed=22, longest=1)[0] * 90, [7]]
    with serving(
        pair.ours,
        num_blocks=num_blocks,
        max_num_batched_tokens=tokens,
        can_overlap_steps=can_overlap_steps,
    ) as engine:

        async def beside_streams() -> list[Any]:
            streams = [complete(engine, prompt, greedy(20, ignore_eos=True)) for prompt in some]
            asked = [scores(engine, prompt) for prompt in some]
            return list(await asyncio.gather(*asked, *streams))[: len(some)]

        run(complete(engine, some[-2], greedy(2)))
        found = run(beside_streams())
        assert engine.stats().num_used_blocks == 0
    for prompt, delta in zip(some, found, strict=True):
        assert_transformers(pair, prompt, delta)
        assert (delta.token_ids, delta.finish_reason) == ([], "length")


def test_a_prompt_is_scored_beside_its_answer(pair: Pair) -> None:
    """The answer is that of a request without scores, which shares nothing with it."""
    some = prompts(8, seed=23)
    params = SamplingParams(
        max_tokens=6, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=NUM_TOP
    )
    with serving(pair.ours) as engine:
        alone = [run(complete(engine, prompt, greedy(6, ignore_eos=True)))[0] for prompt in some]
        hits = engine.stats().prefix_cache_hits
        found = all_scores(engine, some, params)
        assert engine.stats().prefix_cache_hits == hits
    for prompt, tokens, delta in zip(some, alone, found, strict=True):
        assert_transformers(pair, prompt, delta)
        assert delta.token_ids == tokens
        assert len(delta.logprobs) == 6


def test_no_step_scores_more_than_its_limit(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long and many prompts are, the logits of a step are few, and no token is scored
    twice."""
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", 24)
    counts: list[int] = []
    shapes: list[int] = []

    def spy(runner: ModelRunner) -> None:
        launch, compute = runner.launch, runner._logits

        def spied(scheduled: list[Any]) -> Any:
            counts.append(sum(part.num_scored for part in scheduled))
            return launch(scheduled)

        def sized(scheduled: list[Any]) -> Any:
            logits = compute(scheduled)
            shapes.append(len(logits))
            return logits

        monkeypatch.setattr(runner, "launch", spied)
        monkeypatch.setattr(runner, "_logits", sized)

    some = [[i, *[5] * 99] for i in range(6)]
    with serving(pair.ours, max_num_batched_tokens=512, prepare=spy) as engine:
        found = all_scores(engine, some)
    for prompt, delta in zip(some, found, strict=True):
        assert_transformers(pair, prompt, delta)
    assert max(counts) == 24
    assert sum(counts) == 6 * 99
    assert max(shapes) <= 24 + len(some)


@pytest.mark.parametrize(("max_tokens", "longest"), [(0, 40), (1, 40)])
def test_the_longest_prompt_that_fits_is_scored(pair: Pair, max_tokens: int, longest: int) -> None:
    """A prompt may fill the whole KV cache, as its answer takes no slot; one more is a 400."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, prompt_logprobs=0)
    with serving(pair.ours, num_blocks=longest // BLOCK_SIZE) as engine:
        delta = run(scores(engine, [5] * longest, params))
        assert sum(len(part.token_ids) for part in delta.prompt_logprobs) == longest - 1
        with pytest.raises(ContextLengthExceeded):
            run(scores(engine, [5] * (longest + 1), params))
        assert engine.stats().num_used_blocks == 0


def test_a_stop_token_is_scored_where_the_prompt_is() -> None:
    """A client that cuts the last score off, as for one answer token, cuts none of the prompt's."""
    params = greedy(4, logprobs=1, prompt_logprobs=0)
    with running(FakeRunner(repeat())) as engine:
        delta = run(scores(engine, [1], params))
    assert (delta.token_ids, delta.finish_reason, len(delta.logprobs)) == ([], "stop", 1)
    assert delta.logprobs[0].token_id in config().eos_token_ids
