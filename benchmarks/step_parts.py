"""Parts of a decode step alone: lm_head, and sampling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import Device
from benchmarks.random_runner import RandomRunner
from benchmarks.report import Report, say
from serve_app.engine.device_sampler import DeviceSampler
from serve_app.engine.sampler import Sampler
from serve_app.engine.sequence import Sequence

WAYS: dict[str, dict[str, Any]] = {
    "temperature 0.7": {"temperature": 0.7},
    "temperature 0.7, top_p 0.9": {"temperature": 0.7, "top_p": 0.9},
}
"""The parameters of sampled requests. Greedy tokens are part of the step."""
LOGITS_STD = 1.3
"""About that of a normalized vector of 4,096 numbers times lm_head."""


def measure_head(report: Report, runner: RandomRunner, bandwidth: float) -> None:
    """Records microseconds of lm_head for each batch size, replayed as a CUDA graph, and the share
    of `bandwidth`, bytes per second, at which it reads its weights."""
    rows = report.figures["head"] = []
    weight = head_weight(runner)
    for batch in runner.batches:
        x = torch.randn(batch, runner.config.hidden_size, device=runner.device.device)
        x = x.to(runner.dtype)
        seconds = runner.device.device_seconds(lambda x=x: F.linear(x, weight).float())  # type: ignore[misc]
        share = weight.nbytes / seconds / bandwidth
        rows.append({"batch": batch, "us": round(1e6 * seconds, 1), "share": round(share, 3)})
        say(f"lm_head, {batch} rows: {1e6 * seconds:.1f} us, {share:.0%} of reading")


def head_weight(runner: RandomRunner) -> Tensor:
    """Returns the weight of lm_head, `[vocab_size, hidden_size]`."""
    model = runner.model
    weight = model.embedding if model.lm_head is None else model.lm_head.weight
    assert isinstance(weight, Tensor), "the benchmarks' models have lm_head in floats"
    return weight


def measure_sampling(report: Report, runner: RandomRunner) -> None:
    """Records microseconds of sampling for each batch size and way: of the device, and of the host
    that launches it."""
    rows = report.figures["sampling"] = []
    for way, parameters in WAYS.items():
        for batch in runner.batches:
            row = sampling_row(runner, batch, parameters)
            rows.append({"batch": batch, "way": way, **row})
            say(f"{way}, {batch} rows: {row['us']} us, launched in {row['host_us']} us")


def sampling_row(runner: RandomRunner, batch: int, parameters: dict[str, Any]) -> dict[str, Any]:
    """Samples `batch` rows of random logits."""
    device: Device = runner.device
    sequences = runner.sequences(batch, 16, **parameters)
    logits = LOGITS_STD * torch.randn(batch, runner.config.vocab_size, device=device.device)
    sampler = runner.runner.sampler
    device_s, host_s = device.queued_seconds(lambda: sample(sampler, logits, sequences))
    return {"us": round(1e6 * device_s, 1), "host_us": round(1e6 * host_s, 1)}


def sample(sampler: Sampler | DeviceSampler, logits: Tensor, sequences: list[Sequence]) -> None:
    """Samples a token for each row of `logits` `[sequences, vocab_size]` as a step does."""
    sampler.sample(logits, sequences)
