"""Compares `DeviceSampler` with `Sampler` on the device before it is used."""

import logging

import torch

from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.sampler import Sampler
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import Sequence
from serve_app.model.kernels.cuda.sampling import SampleKernel
from serve_app.model.kernels.unavailable import StepUnavailable

log = logging.getLogger(__name__)

TRIAL_PARAMS = (
    SamplingParams(1, temperature=0),
    SamplingParams(1, temperature=0.7),
    SamplingParams(1, temperature=1.3, top_k=40),
    SamplingParams(1, temperature=0.9, top_p=0.9),
    SamplingParams(1, temperature=1.0, min_p=0.05),
    SamplingParams(1, temperature=0.8, top_k=100, top_p=0.95, repetition_penalty=1.2),
    SamplingParams(1, temperature=0, presence_penalty=1, frequency_penalty=0.5),
    SamplingParams(1, min_tokens=4, logit_bias={3: 5.0, 5: -100.0}),
)
"""Parameters of the trial's rows; row i uses the parameters i modulo their number."""
MAX_ROWS = 32
"""Maximum number of rows in the trial."""
MAX_DIFFERENT = 1
"""Number of rows that may differ: rounding can flip the choice between two almost equal tokens."""


@torch.inference_mode()
def verified_sampler(kernel: SampleKernel, vocab_size: int, device: torch.device) -> DeviceSampler:
    """Returns a sampler with `kernel` that has passed the trial.

    Raises `StepUnavailable` if its tokens differ from `Sampler`'s or the kernel fails, and
    `torch.OutOfMemoryError` if the device has no memory for the trial.
    """
    rows = min(MAX_ROWS, kernel.max_rows)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, vocab_size, generator=generator)).to(device)
    logits[-1, vocab_size // 2] = torch.nan
    try:
        sampler = DeviceSampler(kernel, vocab_size, device)
        expected = Sampler().sample(logits.clone(), _sequences(rows, vocab_size))
        actual = sampler.sample(logits, _sequences(rows, vocab_size))
        num_different = int((actual.tokens != expected.tokens).sum())
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # a driver may raise any exception; torch then samples
        log.exception("The GPU's sampling kernel failed in its trial; torch samples instead.")
        reason = f"the kernel failed in its trial ({type(failure).__name__}: {str(failure)[:200]})"
        raise StepUnavailable(reason) from None
    if num_different > MAX_DIFFERENT:
        raise StepUnavailable(f"{num_different} of {rows} tokens differ from plain torch's")
    return sampler


def _sequences(rows: int, vocab_size: int) -> list[Sequence]:
    """Returns new sequences: each sampler stores its own state in them."""
    stops = frozenset({2, 7})
    prompts = [[token_id % vocab_size for token_id in range(row, row + 9)] for row in range(rows)]
    return [
        Sequence(prompt, TRIAL_PARAMS[row % len(TRIAL_PARAMS)], seed=row, stop_ids=stops)
        for row, prompt in enumerate(prompts)
    ]
