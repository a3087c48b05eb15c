"""The GPU benchmark at toy sizes on a CPU."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, kernel_cases, random_runner, step_kernels
from benchmarks.device import Device
from benchmarks.random_runner import RandomRunner
from benchmarks.roofline import decode_bytes, experts_hit
from benchmarks.step_times import StepTimes
from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.step_cost import StepShape
from serve_app.model.kernels.cpu.cpu_step import CpuStep
from serve_app.model.kernels.triton import (
    gpu_step,
    nf4_decode,
    nf4_unpack,
    paged_attention,
    prompt_step,
    step_trial,
)
from serve_app.model.quantization import Quantization
from tests.triton_interpreter import prepare_once
from tools.random_model import config_of

prepare_once()

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond for each operation of each program of a kernel, however
    large its tensors are. So a program takes all rows, and a trial few tokens. A profile has one
    step, because that of an interpreter has many events."""
    monkeypatch.setattr(step_kernels, "STEPS", 1)
    monkeypatch.setattr(nf4_unpack, "ROWS", 256)
    monkeypatch.setattr(nf4_decode, "GATE_UP_ROWS", 512)
    monkeypatch.setattr(nf4_decode, "rows_of", lambda tile: 256)
    monkeypatch.setattr(paged_attention, "NUM_PROGRAMS", 1)  # a context is one split
    monkeypatch.setattr(step_trial, "TRIAL_ROWS", 2)
    monkeypatch.setattr(step_trial, "LONG_CONTEXTS", ())
    monkeypatch.setattr(prompt_step, "TRIAL_CHUNKS", ((3, 20),))


@pytest.mark.parametrize("weights", [["--weights", "nf4"], ["--weights", "bf16"]])
def test_it_runs_at_toy_sizes_on_a_cpu(
    weights: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every part of the document is there, with positive figures."""
    assert gpu.main(["--tiny", "--device", "cpu", "--batches", "1", "2", *weights]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["context"], row["batch"], row["temperature"]) for row in document["decode"]]
    assert rows == list(product((40, 264), (1, 2), (0.0, 0.7)))
    assert all(row["tokens_per_s"] > 0 and row["limit"] > 0 for row in document["decode"])
    assert [reason.partition(":")[0] for reason in document["left_out"]] == [
        "batch 1 at context 2008",
        "batch 2 at context 2008",
    ]
    assert [row["batch"] for row in document["head"]] == [1, 2]
    assert [row["batch"] for row in document["sampling"]] == [1, 2, 1, 2]
    assert all(row["us"] > 0 for row in (*document["head"], *document["sampling"]))
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
    assert measured == (in_4_bits if "nf4" in weights else set())


def test_failures_are_recorded_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong product, a batch size and a kernel that fail are recorded with reasons; the file has
    the other figures."""
    file = tmp_path / "gpu.json"

    def failing(one: RandomRunner, batch: int, *_: object) -> tuple[float, int]:
        known = json.loads(file.read_text())
        if batch == 2:
            assert known["read_gb_per_s"] > 0
            raise torch.OutOfMemoryError("no memory")
        return 1.0, 1

    def no_kernel(*_: Any, **__: Any) -> Any:
        raise RuntimeError("an illegal instruction")

    monkeypatch.setattr(gpu, "relative_errors", lambda *_: {"experts (triton)": float("nan")})
    monkeypatch.setattr(RandomRunner, "decode", failing)
    monkeypatch.setattr(kernel_cases, "down", no_kernel)
    options = ["--tiny", "--device", "cpu", "--batches", "2", "1", "--contexts", "512"]
    options += ["--save", str(file)]
    options += ["--parts", "products", "step", "kernels"]
    assert gpu.main(options) == 1
    document = json.loads(file.read_text())
    assert document["failures"] == {
        "products": "ValueError: wrong on this device: experts (triton)",
        "decode of 2 at 40, temperature 0.0": "OutOfMemoryError: no memory",
        "decode of 2 at 40, temperature 0.7": "OutOfMemoryError: no memory",
        "kernels: down": "RuntimeError: an illegal instruction",
    }
    assert [row["batch"] for row in document["decode"]] == [1, 1]
    assert {row["kernel"] for row in document["kernels"]} == {"gate_up", "qkv", "o", "attention"}
    assert "FAILED: decode of 2" in capsys.readouterr().err


def test_a_replayed_step_is_compared_with_a_launched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is 0, until the replay reads other blocks than the sequences'."""
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
    tables = [sequence.block_table for sequence in made.sequences(2, made.context)]
    assert max(map(max, tables)) < made.runner.cache.num_blocks
    assert "one for each of 2 batch sizes" in made.note
    assert made.graph_error() == 0
    monkeypatch.setattr(DecodeGraphs, "_copy_tables", lambda graphs, _: graphs._tables.zero_())
    error = made.graph_error()
    assert error is not None
    assert error > 1e-2


def test_what_does_not_fit_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KV cache larger than the memory leaves out one batch size at one context length."""
    monkeypatch.setattr(random_runner, "CPU_BLOCKS", 100)
    options = ["--tiny", "--device", "cpu", "--layers", "1", "--batches", "1", "3"]
    options += ["--contexts", "512", "4096", "--streams", "1"]
    made = RandomRunner(gpu.parse(options), Device(torch.device("cpu")))
    # 25 blocks are the longest prompt's; of the other 75, a sequence takes 23 or 37.
    assert made.cases == [(1, 40), (3, 40), (1, 264)]
    assert made.left_out == ["batch 3 at context 264: a KV cache of 0.0 GB does not fit"]
    assert made.runner.cache.num_blocks == 25 + 69


def test_kernels_of_a_step_are_counted_by_step_and_by_layer() -> None:
    """Each layer of a float model has one product for q, k and v, and one for o; lm_head, which a
    step has once, is not a layer's."""
    options = ["--tiny", "--device", "cpu", "--weights", "bf16", "--batches", "1", "--streams", "1"]
    made = RandomRunner(gpu.parse(options), Device(torch.device("cpu")))
    made.runner._cpu_step = None  # the model in torch, whose operations the profiler sees
    table = step_kernels.kernels_of_prompt(made, 20)
    launches = {row["name"]: row["launches"] for row in table["kernels"]}
    assert launches["aten::rms_norm"] == 2 * 2 + 1
    assert launches["aten::topk"] == 2
    assert table["launches"] == pytest.approx(sum(launches.values()), abs=0.1)
    assert table["launches_per_layer"] == sum(int(n) // 2 for n in launches.values())
    times = [row["us"] for row in table["kernels"]]
    assert times == sorted(times, reverse=True)


def test_it_imports_nothing_of_the_server() -> None:
    """The GPU machine has torch, triton, numpy and cuda-bindings alone."""
    program = (
        "import sys; import benchmarks.gpu; "
        "print(*{'ray', 'pydantic', 'yaml', 'transformers', 'starlette', 'aiohttp', 'psutil', "
        "'safetensors', 'tokenizers'} & {name.partition('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


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
