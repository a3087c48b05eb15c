"""Measures the load of each form of checkpoint, and a plain read of the same files.

    python -m benchmarks.forms --gb 0.5

Writes a synthetic Mixtral of `--gb` gigabytes in bfloat16, and the same weights in bitsandbytes' 4
bits and in our own form. Then loads each and reads its files by one thread, by turns; the files are
dropped from the page cache before. A load ends with the model on the device; floats are quantized
on the way. Imports are not timed.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.report import new_parser, publish
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.loader import load
from serve_app.model.checkpoint.shards import INDEX
from serve_app.model.checkpoint.tensor_names import Weight, module_weights
from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import parameters
from serve_app.model.quantization import Quantization
from serve_app.model.quantize import quantize

SMALL = {"hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8}
FULL = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
QUANTIZATION = Quantization("nf4", "nested")


def config_of(gb: float) -> dict[str, Any]:
    """Returns a config.json with as many layers as `gb` gigabytes of bfloat16 hold."""
    document = {
        "model_type": "mixtral",
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "head_dim": 128,
        **(FULL if gb > 20 else SMALL),
    }
    layer = sum(parameters(MixtralConfig.from_dict(document)).values()) * 2
    return {**document, "num_hidden_layers": max(1, round(gb * 1e9 / layer))}


def write_layers(
    folder: Path,
    document: dict[str, Any],
    encode: Callable[[Weight, torch.Tensor], dict[str, torch.Tensor]],
) -> None:
    """Writes a checkpoint of random weights, a file per layer, with tensors from `encode`."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    files: dict[str, list[Weight]] = {}
    for module_weight in module_weights(MixtralConfig.from_dict(document)):
        layer = "other" if module_weight.layer is None else module_weight.layer
        files.setdefault(f"model-{layer}.safetensors", []).extend(module_weight.weights)
    weight_map: dict[str, str] = {}
    for file, weights in files.items():
        tensors: dict[str, torch.Tensor] = {}
        for weight in weights:
            values = torch.randn(weight.shape, generator=generator).mul_(0.02).bfloat16()
            tensors |= encode(weight, values)
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(document))


def as_bitsandbytes(weight: Weight, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the tensors that transformers 4 wrote for a weight with double quantization."""
    name = weight.name
    if not weight.is_quantized:
        return {name: values}
    matrix = quantize(values, QUANTIZATION.quant_type, "nested")
    assert matrix.nested is not None
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(matrix.nested.offset),
    }
    return {
        name: matrix.packed.view(-1, 1),
        f"{name}.absmax": matrix.absmax.flatten(),
        f"{name}.quant_map": matrix.code.clone(),
        f"{name}.nested_absmax": matrix.nested.absmax.clone(),
        f"{name}.nested_quant_map": matrix.nested.code.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def write_forms(folder: Path, gb: float) -> tuple[dict[str, Path], float]:
    """Writes all forms. Returns their folders and the seconds of the conversion."""
    document = config_of(gb)
    forms = {form: folder / form for form in ("float", "bitsandbytes", "fused")}
    write_layers(forms["float"], document, lambda weight, values: {weight.name: values})
    in_4_bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    stored = {**document, "quantization_config": in_4_bits}
    write_layers(forms["bitsandbytes"], stored, as_bitsandbytes)
    start = time.perf_counter()
    convert(forms["float"], forms["fused"], QUANTIZATION)
    return forms, time.perf_counter() - start


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_plainly(folder: Path) -> float:
    """Returns the seconds in which one thread reads all files of a folder, one after the other."""
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def load_once(folder: Path, device: torch.device) -> float:
    """Returns the seconds to load a folder onto the device."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    start = time.perf_counter()
    load(inspect(folder), dtype=dtype, device=device, quantization=QUANTIZATION)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(folder: Path, device: torch.device, repeats: int) -> dict[str, Any]:
    """Loads one checkpoint and reads its files, alternately. Returns medians."""
    size = inspect(folder).file_bytes / 1e9
    loads, reads = [], []
    for _ in range(repeats):
        forget(folder)
        reads.append(read_plainly(folder))
        forget(folder)
        loads.append(load_once(folder, device))
    load_s, read_s = statistics.median(loads), statistics.median(reads)
    return {
        "gb": round(size, 3),
        "load_s": round(load_s, 3),
        "load_gb_per_s": round(size / load_s, 3),
        "read_s": round(read_s, 3),
        "read_gb_per_s": round(size / read_s, 3),
        "share_of_read": round(read_s / load_s, 3),
        "all_load_s": [round(seconds, 3) for seconds in loads],
        "all_read_s": [round(seconds, 3) for seconds in reads],
    }


def main() -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--gb", type=float, default=0.4, help="of the bfloat16 checkpoint")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default a new one")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.zeros(1, device=device)  # the driver's start is no part of a load
    folder = Path(tempfile.mkdtemp(prefix="forms-", dir=options.folder))
    try:
        if shutil.disk_usage(folder).free < options.gb * 2e9:
            print(f"{folder}: {options.gb * 2:.1f} GB are needed.", file=sys.stderr)
            return 1
        forms, convert_s = write_forms(folder, options.gb)
        print(f"{'form':>13} {'GB':>7} {'load s':>8} {'GB/s':>7} {'read s':>8} {'GB/s':>7} share")
        results = {}
        for form, path in forms.items():
            result = results[form] = measure(path, device, options.repeats)
            print(
                f"{form:>13} {result['gb']:>7} {result['load_s']:>8} {result['load_gb_per_s']:>7} "
                f"{result['read_s']:>8} {result['read_gb_per_s']:>7} {result['share_of_read']:.0%}"
            )
    finally:
        shutil.rmtree(folder)
    figures = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "convert_s": round(convert_s, 3),
        "forms": results,
    }
    publish("forms", figures, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
