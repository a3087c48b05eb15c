"""Steps on a GPU take no more memory than is planned for them, at Mixtral's sizes."""

import pytest
import torch

from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.prompt_scores import PromptScores
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_sizes import MAX_PIECE, MAX_SCORED_TOKENS, capture_sizes
from serve_app.model.footprint import decode_bytes, logits_bytes
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.triton.gpu_step import GpuStep
from tests.engine.fake_gpu import GPU, FakeGpu, Recorded, gpu
from tests.engine.test_never_waits import BLOCK_SIZE, runner_of
from tests.model.kernels.held import Held
from tools.random_model import config_of

__all__ = ["gpu"]
CONFIG = config_of(tiny=False, layers=2)


@pytest.mark.parametrize("max_num_seqs", [32, 100])
def test_decode_steps(max_num_seqs: int, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of every size with their outputs, attention's splits and the sampler's scores."""
    sizes = capture_sizes(max_num_seqs)
    with gpu, torch.inference_mode():
        runner = runner_of(gpu, monkeypatch, in_torch=False)
        with Held() as held:
            step = GpuStep(runner.model, runner.cache, max_num_seqs, in_cuda=True)

            def make(name: str, *_: object) -> Recorded:
                return Recorded(gpu, name)

            kernel = SampleKernel(CONFIG.vocab_size, sizes[-1], Card(90, 132), GPU, make)
            sampler = DeviceSampler(kernel, CONFIG.vocab_size, GPU)
            graphs = DecodeGraphs(step, max_num_seqs, 2049, BLOCK_SIZE, GPU, sampler)
            for size in reversed(sizes):
                graphs._computation(size)()
    planned = decode_bytes(CONFIG, 2, sizes[-1], sum(sizes))
    assert 0.7 < held.largest / planned < 1


def test_sampling_in_torch(gpu: FakeGpu) -> None:
    """The steps of two batches, the second with counts of the first, at most two thirds of what is
    planned: how much a GPU's sort takes is not known."""
    how = SamplingParams(9, temperature=0.7, repetition_penalty=1.1, top_p=0.9, logprobs=5)
    with gpu, torch.inference_mode(), Held() as held:
        logits = torch.empty(32, CONFIG.vocab_size, device=GPU)
        batch = [Sequence([1, 2, 3], how, i, frozenset({2})) for i in range(32)]
        sampler = Sampler()
        sampler.sample(logits, batch)
        for sequence in batch:
            sequence.token_ids.append(0)
        sampler.sample(logits[1:], batch[1:])
    assert 0.4 < held.largest / logits_bytes(CONFIG, 2, 32, 0, 0) < 0.7


def test_scored_prompts(gpu: FakeGpu) -> None:
    """The logits of as many prompt tokens as a step scores, and their log softmax in pieces."""
    scored = SamplingParams(1, prompt_logprobs=20)
    sequence = Sequence([0] * (MAX_SCORED_TOKENS + 9), scored, 0, frozenset())
    with gpu, torch.inference_mode(), Held() as held:
        logits = torch.empty(MAX_SCORED_TOKENS, CONFIG.vocab_size, dtype=torch.bfloat16, device=GPU)
        PromptScores([ScheduledTokens(sequence, 0, MAX_SCORED_TOKENS, False)], logits.float())
    planned = logits_bytes(CONFIG, 2, 0, MAX_SCORED_TOKENS, MAX_PIECE)
    assert 0.7 < held.largest / planned < 1.01
