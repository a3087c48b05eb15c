"""Loads a checkpoint onto a device, tensor by tensor.

`load` takes what `checkpoint.inspect` found, which is everything that can be wrong with the files
before a weight is read. Peak memory is the model, one tensor, and the next one, which a thread
reads meanwhile. After the load the bytes in memory are compared with what the quantization
promises.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.fused_reader import fused_places, read_fused
from serve_app.model.checkpoint.source import DTYPES, Source
from serve_app.model.checkpoint.weight_mapping import put, put_head
from serve_app.model.footprint import PARTS, expected_shapes, weight_bytes
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization

HEAD = "lm_head.weight"
TOLERANCE = 0.02
"""Share of a part's promised bytes that the loaded ones may differ by."""

Progress = Callable[[float], None]
"""Called with the share of the weights that is loaded, from 0 to 1."""


def load(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Quantization | None = None,
    quantize_lm_head: bool = False,
    progress: Progress | None = None,
) -> Mixtral:
    """The model of `checkpoint` on `device`, its floats in `dtype`.

    `quantization` is what `Checkpoint.resolve_quantization` returned; with it experts and attention
    are in 4 bits, and lm_head too with `quantize_lm_head`. Float tensors are quantized one by one
    on `device`. Raises `ModelLoadFailed` when a file is not what its header said, and when the
    loaded weights take other than the promised memory.
    """
    tell = progress or (lambda done: None)
    with torch.device("meta"):
        model = Mixtral(checkpoint.config, quantization, quantize_lm_head).to(dtype)
    model.to_empty(device=device)
    model.rope.fill()
    if checkpoint.form == "fused":
        _read_fused(checkpoint, model, tell)
    else:
        _read_one_by_one(checkpoint, model, tell)
    check_bytes(model, dtype, quantization, quantize_lm_head)
    return model


def _read_fused(checkpoint: Checkpoint, model: Mixtral, tell: Progress) -> None:
    """Our own form: by several threads, straight into place, but for a head in 4 bits."""
    places = fused_places(model)
    floats = None
    if (head := checkpoint.tensors.get(HEAD)) is not None and HEAD not in places:
        dtype, device = DTYPES[head.dtype], model.embedding.device
        places[HEAD] = floats = torch.empty(head.shape, dtype=dtype, device=device)
    read_fused(checkpoint, places, tell)
    if floats is not None:
        put_head(model, floats)


def _read_one_by_one(checkpoint: Checkpoint, model: Mixtral, tell: Progress) -> None:
    """Any other form: a thread reads the next weight while this one quantises the last."""
    shapes = expected_shapes(checkpoint.config, stacked=False)
    total, done = sum(prod(shape) for shape in shapes.values()), 0
    source = Source(checkpoint)
    with ThreadPoolExecutor(1, "read-weights") as reader:
        names = iter(shapes)
        ahead = reader.submit(source.weight, next(names))
        for name, shape in shapes.items():
            weight = ahead.result()
            if (following := next(names, None)) is not None:
                ahead = reader.submit(source.weight, following)
            put(model, name, weight)
            done += prod(shape)
            tell(done / total)


def check_bytes(
    model: Mixtral,
    dtype: torch.dtype,
    quantization: Quantization | None,
    quantize_lm_head: bool = False,
) -> None:
    """Raises `ModelLoadFailed` where a part of `model` takes other than the promised memory."""
    promised = weight_bytes(model.config, dtype.itemsize, quantization, quantize_lm_head)
    for tables in (model.rope, model.codes):
        promised["other"] += sum(table.nbytes for table in tables.buffers()) if tables else 0
    for part, loaded in bytes_by_part(model).items():
        if abs(loaded - promised[part]) > TOLERANCE * promised[part]:
            form = str(dtype).removeprefix("torch.")
            if quantization is not None and part in ("experts", "attention"):
                form = quantization.quant_type
            raise ModelLoadFailed(
                f"The weights of `{part}` take {loaded:,} bytes of memory where {form} takes "
                f"{promised[part]:,}: not all of them are {form}; this is a fault of the server."
            )


def bytes_by_part(model: Mixtral) -> dict[str, int]:
    """Bytes of the weights in memory: `{"experts", "attention", "head", "other"}`.

    "head" is the embedding matrix and the output head (one, when they are tied); "other" the
    routers, the norms and the rotary tables.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sizes[_part(name)] += tensor.nbytes
    return sizes


def _part(name: str) -> str:
    if ".experts." in name:
        return "experts"
    if ".attention." in name:
        return "attention"
    return "head" if name == "embedding" or name.startswith("head.") else "other"
