"""The memory that a configuration needs, and whether this machine has it.

The sizes are those of the published checkpoints: 93.41 GB in bfloat16, 26.65 GB in
bitsandbytes' 4 bits with float32 absmax, 24.48 GB with double quantization; both take 25.20 GB in
memory, where absmax is bfloat16.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.check import main
from serve_app.cold_start.check import check
from serve_app.machine.gpus import find_gpus
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.footprint import (
    decode_bytes,
    logits_bytes,
    parameters,
    trial_bytes,
    weight_bytes,
)
from serve_app.start_plan.memory import UNPLANNED_BYTES
from serve_app.tiny import CHECKPOINT
from tests.hub import serve
from tests.model.checkpoint import full_size
from tests.nvml import RTX_4090, RTX_5090, Install, write
from tools.random_model import config_of

MIB = 1 << 20
IN_4_BITS: dict[str, dict[str, Any]] = {
    "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
}


def checkpoint(folder: Path, tensors: full_size.Tensors, shards: int, **config: Any) -> Path:
    for file in CHECKPOINT.glob("tokenizer*"):
        shutil.copy(file, folder)
    return full_size.write(folder, tensors, shards, **config)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("floats"), full_size.floats(), 19)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = full_size.in_4_bits(nested=True)
    return checkpoint(tmp_path_factory.mktemp("nested"), tensors, 6, **IN_4_BITS)


def config(folder: Path, name: Path, model: Any = None, engine: Any = None) -> Path:
    """Writes configs/local.yaml with another model folder and some settings; returns its path."""
    document = yaml.safe_load(Path("configs/local.yaml").read_text())
    args = document["applications"][0]["args"]
    args["model"] |= {"name": str(name), **(model or {})}
    args["engine"] |= engine or {}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def sentence(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    assert main([str(path)]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.endswith(".")
    return said


@pytest.mark.parametrize(
    ("is_nested", "size", "promised"),
    [(None, 93.41, 93.41), (False, 26.65, 25.20), (True, 24.48, 25.20)],
)
def test_the_plan_has_the_full_models_sizes(
    is_nested: bool | None, size: float, promised: float, tmp_path: Path
) -> None:
    """Files, their shards, and memory, to the published hundredth of a gigabyte."""
    if is_nested is None:
        checkpoint = inspect(full_size.write(tmp_path, full_size.floats(), 19))
        assert checkpoint.quantization is None
    else:
        tensors = full_size.in_4_bits(nested=is_nested)
        checkpoint = inspect(full_size.write(tmp_path, tensors, 6, **IN_4_BITS))
        assert len(checkpoint.packed) == 32 * (4 + 8 * 3)
    assert len(checkpoint.headers) == (19 if is_nested is None else 6)
    assert round(checkpoint.file_bytes / 1e9, 2) == size
    quantization = checkpoint.resolve_quantization(checkpoint.quantization)
    in_memory = weight_bytes(checkpoint.config, 2, quantization)
    assert round(sum(in_memory.values()) / 1e9, 2) == promised
    assert sum(parameters(checkpoint.config).values()) == 46_702_792_704
    written = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert written < 100e6  # the files are sparse


@pytest.mark.parametrize(
    ("absmax", "total", "experts", "attention"),
    [
        ("nested", "25.20 GB", "23.96 GB", "0.71 GB"),
        ("bfloat16", "25.20 GB", "23.96 GB", "0.71 GB"),
    ],
)
def test_the_table_by_part(
    absmax: str,
    total: str,
    experts: str,
    attention: str,
    tmp_path: Path,
    floats: Path,
    nvml: Install,
) -> None:
    """The bytes of each part of float weights that the load quantizes; memory has bfloat16 absmax
    whatever the setting."""
    nvml(RTX_5090)
    lines = check(config(tmp_path, floats, {"absmax": absmax})).lines
    (line,) = [line for line in lines if line.startswith("Weights: ")]
    assert f"{total} of nf4 with bfloat16 absmax" in line
    assert f"experts {experts}, attention {attention}, head 0.52 GB" in line
    assert any("93.41 GB of float weights in 19 files" in line for line in lines)


def test_room_for_kv(tmp_path: Path, nested: Path, nvml: Install) -> None:
    """The KV cache that fits on a 32 GB card beside the weights and what steps, decodes and logits
    take, at 131,072 bytes a token."""
    nvml(RTX_5090)
    lines = check(config(tmp_path, nested)).lines
    assert any("25.20 GB of nf4 with bfloat16 absmax" in line for line in lines)
    sizes = (config_of(tiny=False, layers=32), 2)
    kept = trial_bytes(*sizes, 2) + logits_bytes(*sizes, 32, 512, 128) + UNPLANNED_BYTES
    kept += decode_bytes(*sizes, 32, 87)
    assert 1.9e9 < kept < 2.1e9
    room = 32100 * MIB - kept - 600 * MIB - 25_197_813_760
    assert any(f"room for {room // 131_072:,} tokens" in line for line in lines)
    lines = check(config(tmp_path, nested, engine={"gpu_memory_utilization": 0.9})).lines
    less = room - 32607 * MIB // 10
    assert any(f"room for {less // 131_072:,} tokens" in line for line in lines)


@pytest.mark.parametrize("absmax", ["nested", "bfloat16"])
def test_24_gb_do_not_fit(
    absmax: str, tmp_path: Path, floats: Path, nvml: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """A 24 GB card is refused with every absmax; the error names a size that fits."""
    nvml(RTX_4090)
    said = sentence(capsys, config(tmp_path, floats, {"absmax": absmax}))
    assert "too small" in said
    assert "RTX 4090 has 25.27 GB free" in said
    assert "32 GB or more" in said


def test_the_error_names_what_helps(
    tmp_path: Path, floats: Path, nvml: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy fits the cause: a long context, other programs on the card, float weights."""
    nvml(RTX_5090)
    long = config(tmp_path, floats, engine={"kv_cache_tokens": 200_000})
    assert "lower `engine.max_model_len` or `engine.kv_cache_tokens`" in sentence(capsys, long)
    nvml(("NVIDIA GeForce RTX 5090", 32607, 20000))
    assert "end the other programs on it" in sentence(capsys, config(tmp_path, floats))
    nvml(("NVIDIA A100-SXM4-80GB", 81920, 81000))
    unquantized = config(tmp_path, floats, {"quantization": "none"})
    assert "set `model.quantization` to nf4" in sentence(capsys, unquantized)


def test_the_smallest_gpu_counts(tmp_path: Path, floats: Path, nvml: Install, capsys: Any) -> None:
    """The smallest of several GPUs decides, because the replica may get any of them."""
    nvml(RTX_5090, RTX_4090)
    assert [card.total_bytes for card in find_gpus()] == [32607 * MIB, 24564 * MIB]
    assert "RTX 4090" in sentence(capsys, config(tmp_path, floats))


def test_gpus_that_are_hidden_do_not_count(
    tmp_path: Path, floats: Path, nvml: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small GPU beside the one that `CUDA_VISIBLE_DEVICES` chooses refuses no start."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    nvml(RTX_5090, RTX_4090)
    lines = check(config(tmp_path, floats)).lines
    assert any("GPU: NVIDIA GeForce RTX 5090 with" in line for line in lines)


def test_no_gpu(
    tmp_path: Path, floats: Path, nvml: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a GPU, cuda is refused, and auto for all but the tiny model; cpu works if main
    memory suffices."""
    nvml(failure="NVML Shared Library Not Found")
    for device in ("cuda", "auto"):
        said = sentence(capsys, config(tmp_path, floats, {"device": device}))
        assert f"`model.device` is {device}, but NVML finds no GPU" in said
        assert "25.20 GB" in said
    tiny = config(tmp_path, Path("tiny"), {"device": "auto"})
    assert any("the tiny model needs no GPU" in line for line in check(tiny).lines)
    huge = config(tmp_path, floats, {"device": "cpu", "quantization": "none", "dtype": "float32"})
    assert "needs 19" in sentence(capsys, huge)  # 187 GB and the KV cache


def test_a_gpu_that_reports_no_size(tmp_path: Path, floats: Path, nvml: Install) -> None:
    """A GPU that reports no memory size passes, with a line about it."""
    nvml(("NVIDIA GB10", None, None))
    lines = check(config(tmp_path, floats)).lines
    assert any("does not report its memory" in line for line in lines)


def test_kv_cache_is_whole_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The KV cache has whole blocks; one that then is smaller than the context is refused."""
    engine = {"kv_cache_tokens": 1000, "max_model_len": 1000}
    said = sentence(capsys, config(tmp_path, CHECKPOINT, {"device": "cpu"}, engine))
    assert "992 in whole blocks" in said


def test_a_type_that_the_weights_do_not_have(
    tmp_path: Path, nested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Settings that ask for another quantization than the files have are refused by the check."""
    for asked in ("fp4", "none"):
        path = config(tmp_path, nested, {"quantization": asked})
        assert "set `model.quantization` to nf4" in sentence(capsys, path)


def run_check(path: Path, hub: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Returns the command in a process that sees `hub` as the hub, an empty cache, and one RTX
    5090."""
    write(path.parent, RTX_5090, driver="580.65.06")
    machine = {"PYTHONPATH": str(path.parent), "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "serve_app.check", str(path)],
        env={**os.environ, **machine, "HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )


SMALL_FILES = dict.fromkeys(
    ("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"), 0
)


def test_a_checkpoint_on_the_hub_is_planned_without_its_weights(tmp_path: Path) -> None:
    """config.json and the list of files are enough: the download's size and the memory, and a
    quantization that we cannot read is refused."""
    path = config(tmp_path, Path("o/m"))
    stored = {**IN_4_BITS["quantization_config"], "bnb_4bit_use_double_quant": True}
    document = {**full_size.CONFIG, "quantization_config": stored}
    sizes = SMALL_FILES | {f"model-0000{i}.safetensors": 5_000_000 for i in range(1, 6)}
    with serve({"config.json": json.dumps(document).encode()}, sizes) as hub:
        done = run_check(path, hub, tmp_path / "home")
        assert done.returncode == 0, done.stderr
        assert "o/m: not on this machine; the first start downloads 25.0 MB." in done.stdout
        assert "25.20 GB of nf4 with bfloat16 absmax" in done.stdout
        assert not list((tmp_path / "home").rglob("*.safetensors"))
    document["quantization_config"] = {"quant_method": "gptq"}
    with serve({"config.json": json.dumps(document).encode()}, sizes) as hub:
        done = run_check(path, hub, tmp_path / "other")
        assert done.returncode == 1
        assert "'gptq'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("asked", ["nf4", "none"])
def test_a_type_that_the_weights_on_the_hub_do_not_have(tmp_path: Path, asked: str) -> None:
    """config.json alone is enough to refuse it, before the download."""
    stored = {**IN_4_BITS["quantization_config"], "bnb_4bit_quant_type": "fp4"}
    document = {**full_size.CONFIG, "quantization_config": stored}
    path = config(tmp_path, Path("o/m"), {"quantization": asked})
    sizes = SMALL_FILES | {"model.safetensors": 5}
    with serve({"config.json": json.dumps(document).encode()}, sizes) as hub:
        done = run_check(path, hub, tmp_path / "home")
    assert done.returncode == 1
    assert "o/m: the weights are already fp4; set `model.quantization` to fp4" in done.stderr


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    """A missing network is one line on stderr."""
    done = run_check(config(tmp_path, Path("o/m")), "http://127.0.0.1:1", tmp_path / "home")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "check the network" in line


def test_a_disk_too_small_for_the_download(tmp_path: Path) -> None:
    """The error has the size of the download."""
    sizes = SMALL_FILES | {"model.safetensors": 10**18}
    with serve({"config.json": json.dumps(full_size.CONFIG).encode()}, sizes) as hub:
        done = run_check(config(tmp_path, Path("o/m")), hub, tmp_path / "home")
    assert done.returncode == 1
    assert "the download takes 1000000000.0 GB" in done.stderr
