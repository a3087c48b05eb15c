"""The GPU benchmark at toy sizes on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, kernel_cases
from benchmarks.device import Device
from benchmarks.random_runner import RandomRunner
from benchmarks.roofline import decode_bytes, experts_hit
from benchmarks.step_times import StepTimes
from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.step_cost import StepShape
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.triton import gpu_step, paged_attention
from serve_app.model.quantization import Quantization
from tests.triton_interpreter import prepare_once
from tools.random_model import config_of

prepare_once()


@pytest.mark.parametrize("weights", [["--absmax", "nested"], ["--weights", "bf16"]])
def test_it_runs_at_toy_sizes_on_a_cpu(
    weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of the document is there, with positive figures."""
    assert gpu.main(["--tiny", "--device", "cpu", "--batches", "1", "2", *weights]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in document["decode"]] == [1, 2]
    assert all(row["tokens_per_s"] > 0 and row["limit"] > 0 for row in document["decode"])
    prompts = document["prompts"]
    assert [(row["tokens"], row["streams"]) for row in prompts] == [
        (tokens, streams) for tokens in (9, 16, 72) for streams in (0, 1, 2)
    ]
    assert all(row["first_token_ms"] > 0 and sum(row["cuts"]) == row["tokens"] for row in prompts)
    assert all(("to_alone" in row) == (row["streams"] > 0) for row in prompts)
    table = StepTimes(**document["step_times_ms"])
    assert [batch for batch, _ in table.decodes] == [1, 2]
    assert table.seconds(StepShape(2, 80, 64, 2000)) > 0
    measured = {row["kernel"] for row in document.get("kernels", ())}
    in_4_bits = {"gate_up", "down", "qkv", "o", "attention"}
    assert measured == (in_4_bits if "nested" in weights else set())


def test_failures_are_recorded_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong product, a batch size and a kernel that fail are recorded with reasons; the file has
    the other figures."""
    file = tmp_path / "gpu.json"

    def failing(one: RandomRunner, batch: int) -> float:
        known = json.loads(file.read_text())
        if batch == 2:
            assert known["read_gb_per_s"] > 0
            raise torch.OutOfMemoryError("no memory")
        return 1.0

    def no_kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(gpu, "relative_errors", lambda *_: {"experts (triton)": float("nan")})
    monkeypatch.setattr(RandomRunner, "decode", failing)
    monkeypatch.setattr(kernel_cases, "down", no_kernel)
    options = ["--tiny", "--device", "cpu", "--batches", "2", "1", "--save", str(file)]
    options += ["--parts", "products", "step", "kernels"]
    assert gpu.main(options) == 1
    document = json.loads(file.read_text())
    assert document["failures"] == {
        "products": "ValueError: wrong on this device: experts (triton)",
        "decode of 2": "OutOfMemoryError: no memory",
        "kernels: down": "RuntimeError: an illegal instruction",
    }
    assert [row["batch"] for row in document["decode"]] == [1]
    assert {row["kernel"] for row in document["kernels"]} == {"gate_up", "qkv", "o", "attention"}
    assert "FAILED: decode of 2" in capsys.readouterr().err


def test_a_replayed_step_is_compared_with_a_launched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is 0, until the replay reads other blocks than the sequences'."""
    monkeypatch.setattr(gpu_step, "TRIED_ROWS", 2)
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 1)  # a context is one split
    # On a CPU the runner takes the step of Triton kernels in place of the compiled C.
    monkeypatch.setattr(
        CpuStep, "verified", lambda model, cache, _: gpu_step.GpuStep.verified(model, cache, 2)
    )
    made = RandomRunner(
        gpu.parse(
            ["--tiny", "--device", "cpu", "--layers", "1", "--batches", "2", "--streams", "1"]
        ),
        Device(torch.device("cpu")),
    )
    tables = [sequence.block_table for sequence in made.sequences(2, made.options.context)]
    assert max(map(max, tables)) < made.runner.cache.num_blocks
    assert "a captured graph for each of 2 batch sizes" in made.note
    assert made.graph_error() == 0
    monkeypatch.setattr(DecodeGraphs, "_copy_tables", lambda graphs, _: graphs._tables.zero_())
    error = made.graph_error()
    assert error is not None
    assert error > 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_cuda_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Without CUDA it prints one sentence, and the exit code is 1."""
    assert gpu.main([]) == 1
    assert capsys.readouterr().out.startswith("No CUDA device")


def test_the_least_bytes_of_a_step_are_those_of_the_models_sizes() -> None:
    """Mixtral in NF4 reads 6.8 GB for one token of a short context, and all experts for many."""
    config, nested = config_of(tiny=False, layers=None), Quantization("nf4", "nested")
    assert experts_hit(config, 1) == pytest.approx(2)
    assert experts_hit(config, 64) == pytest.approx(8)
    assert decode_bytes(config, nested, 1, 0, 2) == pytest.approx(6.77e9, rel=0.01)
    assert decode_bytes(config, nested, 16, 0, 2) == pytest.approx(24.0e9, rel=0.02)
