"""Loads a checkpoint onto a device, tensor by tensor.

`checkpoint.inspect` finds all errors that are visible without reading a weight. The peak memory is
the model, one tensor, and the next tensor, which a thread reads in the meantime. After the load,
the bytes in memory are compared with the bytes that the quantization needs.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from math import prod

import torch
from torch import nn

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.form import fused_version
from serve_app.model.checkpoint.fused_reader import fused_targets, read_files
from serve_app.model.checkpoint.fused_version1 import read_version_1
from serve_app.model.checkpoint.source import DTYPES, Source
from serve_app.model.checkpoint.tensor_names import LM_HEAD, PARTS, weights
from serve_app.model.checkpoint.weight_mapping import load_lm_head, load_weight
from serve_app.model.footprint import weight_bytes
from serve_app.model.mixtral import DecoderLayer, Mixtral
from serve_app.model.quantization import Quantization
from serve_app.model.quantized_weight import Codebook

TOLERANCE = 0.02
"""Maximum relative difference between the expected and the loaded bytes of a part."""

Progress = Callable[[float], None]
"""Called with the share of the weights that are loaded, from 0 to 1."""


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    quantize_lm_head: bool = False,
    progress: Progress | None = None,
) -> Mixtral:
    """Returns the model of `checkpoint` on `device`, with float weights in `dtype`.

    `quantization` is the result of `Checkpoint.resolve_quantization`. With it, experts and
    attention have 4-bit weights, except for the checkpoint's `float_modules`; with
    `quantize_lm_head`, lm_head too. Float tensors are quantized one by one on `device`.

    Raises `ModelLoadFailed` if a file does not match its header, or if the loaded weights do not
    have the expected bytes.
    """
    report = progress or (lambda done: None)
    with torch.device("meta"):
        model = Mixtral(
            checkpoint.config, quantization, quantize_lm_head, checkpoint.float_modules
        ).to(dtype)
    model.to_empty(device=device)
    model.rope.fill()
    if checkpoint.form == "fused":
        _load_fused(checkpoint, model, report)
    else:
        _load_one_by_one(checkpoint, model, report)
    check_bytes(model, dtype, quantization, quantize_lm_head)
    return model


def _load_fused(checkpoint: Checkpoint, model: Mixtral, report: Progress) -> None:
    """Loads a fused checkpoint with several threads. A 4-bit lm_head is read into a buffer
    first."""
    total, done = checkpoint.file_bytes, 0

    def add(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report(done / total)

    targets = fused_targets(model)
    staged = None
    if (info := checkpoint.tensors.get(LM_HEAD)) is not None and LM_HEAD not in targets:
        dtype, device = DTYPES[info.dtype], model.embedding.device
        targets[LM_HEAD] = staged = torch.empty(info.shape, dtype=dtype, device=device)
    if fused_version(checkpoint.document) == 1:
        read_version_1(checkpoint, model, targets, add)
    else:
        read_files(checkpoint.headers, targets, add)
    if staged is not None:
        load_lm_head(model, weights(checkpoint.config)[LM_HEAD], staged)


def _load_one_by_one(checkpoint: Checkpoint, model: Mixtral, report: Progress) -> None:
    """Loads weights one by one. A thread reads the next weight while the caller's thread quantizes
    the current one."""
    all_weights = list(weights(checkpoint.config).values())
    total, done = sum(prod(weight.shape) for weight in all_weights), 0
    source = Source(checkpoint)
    with ThreadPoolExecutor(1, "read-weights") as reader:
        ahead = reader.submit(source.read, all_weights[0])
        for weight, next_weight in zip(all_weights, [*all_weights[1:], None], strict=True):
            values = ahead.result()
            if next_weight is not None:
                ahead = reader.submit(source.read, next_weight)
            if weight.name == LM_HEAD:
                assert isinstance(values, torch.Tensor)
                load_lm_head(model, weight, values)
            else:
                load_weight(model, weight, values)
            done += prod(weight.shape)
            report(done / total)


def check_bytes(
    model: Mixtral,
    dtype: torch.dtype,
    quantization: Quantization | None,
    quantize_lm_head: bool = False,
) -> None:
    """Raises `ModelLoadFailed` if a part of `model` does not have the expected bytes."""
    expected = weight_bytes(
        model.config, dtype.itemsize, quantization, quantize_lm_head, model.float_modules
    )
    expected["other"] += _num_bytes(model.rope)
    if model.codebook is not None:
        expected["other"] += sum(table.nbytes for table in model.codebook.buffers())
    for part, loaded in bytes_by_part(model).items():
        if abs(loaded - expected[part]) > TOLERANCE * expected[part]:
            form = str(dtype).removeprefix("torch.")
            if quantization is not None and part in ("experts", "attention"):
                form = quantization.quant_type
            raise ModelLoadFailed(
                f"The weights of `{part}` need {loaded:,} bytes of memory, but {form} needs "
                f"{expected[part]:,}, so not all of them are {form}. This is a bug in the server."
            )


def bytes_by_part(model: Mixtral) -> dict[str, int]:
    """Returns the bytes of the weights in memory for each of `PARTS`.

    "head" is the embedding matrix and lm_head (one matrix if they are tied); "other" is the
    routers, the norms, the code values and the rotary tables.
    """
    sizes: dict[str, int] = dict.fromkeys(PARTS, 0)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        sizes["experts"] += _num_bytes(layer.mlp.experts)
        sizes["attention"] += _num_bytes(layer.attention)
    sizes["head"] = model.embedding.nbytes
    if model.lm_head is not None:
        sizes["head"] += _num_bytes(model.lm_head)
    everything = chain(model.parameters(), model.buffers())
    sizes["other"] = sum(tensor.nbytes for tensor in everything) - sum(sizes.values())
    return sizes


def _num_bytes(module: nn.Module) -> int:
    """Returns the bytes of a module's weights without the codebook, which all 4-bit weights
    share."""
    return sum(
        tensor.nbytes
        for part in module.modules()
        if not isinstance(part, Codebook)
        for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False))
    )
