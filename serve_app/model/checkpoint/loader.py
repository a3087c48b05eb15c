"""A checkpoint's folder becomes a model on a device, tensor by tensor.

Peak memory is the model, one tensor, and the next one that is read meanwhile. Everything that can
be wrong with the files is found by `inspect` before the first weight is read; afterwards the bytes
in memory are compared with what the quantisation promises. Knows no settings.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import PARTS, Plan, inspect
from serve_app.model.checkpoint.fused import Quantization, require_whole_blocks
from serve_app.model.footprint import expected_shapes, weight_bytes

# `serve_app.check` uses `inspect` and must answer before torch is even imported.
if TYPE_CHECKING:
    import torch

    from serve_app.model.config import MixtralConfig
    from serve_app.model.mixtral import Mixtral

__all__ = ["Plan", "Quantization", "bytes_by_part", "inspect", "load"]

HEAD = "lm_head.weight"
TOLERANCE = 0.02
"""Share of a part's promised bytes that the loaded ones may differ by."""

Progress = Callable[[float], None]
"""Called with how much of the weights is in place, from 0 to 1."""


def load(
    path: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    quantization: Quantization | None = None,
    quantize_lm_head: bool = False,
    progress: Progress | None = None,
) -> "Mixtral":
    """The model in folder `path`, in `dtype` on `device`, its large matrices in 4 bits if wished.

    Float tensors are quantised one by one on `device`. A checkpoint that is quantised already keeps
    its own absmax; its type must be the one that `quantization` asks for. Its head is in floats in
    any form, and quantised here with `quantize_lm_head`.
    Raises `ModelLoadFailed` as `inspect` does, when a file changes under our hands, and when the
    loaded weights take other than the promised memory.
    """
    import torch

    from serve_app.model.mixtral import Mixtral

    tell = progress or (lambda done: None)
    plan = inspect(path)
    quantization = agreed(plan, quantization)
    require_head(plan.config, quantization, quantize_lm_head)
    with torch.device("meta"):
        model = Mixtral(plan.config, quantization, quantize_lm_head).to(dtype)
    model.to_empty(device=device)
    model.rope.fill()
    if plan.form == "stacked":
        _read_stacked(plan, model, tell)
    else:
        _read_one_by_one(plan, model, tell)
    check_bytes(model, dtype, quantization, quantize_lm_head)
    return model


def agreed(plan: Plan, wished: Quantization | None) -> Quantization | None:
    """How the model in `plan` will be quantised; `ModelLoadFailed` where it cannot be as wished."""
    stored = plan.quantization
    if stored is not None and (wished is None or wished.quant_type != stored.quant_type):
        raise ModelLoadFailed(
            f"{plan.path}: the weights are {stored.quant_type} already; set `model.quantization` "
            f"to {stored.quant_type}, or name the float checkpoint that they were made from."
        )
    if wished is not None:
        require_whole_blocks(plan.config)
    return stored or wished


def require_head(
    config: "MixtralConfig", quantization: Quantization | None, quantize_lm_head: bool
) -> None:
    """Raises `ModelLoadFailed` where there is no head that could be in 4 bits."""
    if quantize_lm_head and quantization is None:
        raise ModelLoadFailed(
            "`model.quantize_lm_head` needs a `model.quantization` other than none."
        )
    if quantize_lm_head and config.tie_embeddings:
        raise ModelLoadFailed(
            "`model.quantize_lm_head`: this model has no head of its own, it uses the embeddings; "
            "set it to false."
        )


def _read_stacked(plan: Plan, model: "Mixtral", tell: Progress) -> None:
    """Our own form: by several threads, straight into place, but for a head in 4 bits."""
    import torch

    from serve_app.model.checkpoint.fused_reader import read_stacked, stacked_places
    from serve_app.model.checkpoint.source import DTYPES
    from serve_app.model.checkpoint.weight_mapping import put_head

    places = stacked_places(model)
    floats = None
    if (head := plan.tensors.get(HEAD)) is not None and HEAD not in places:
        dtype, device = DTYPES[head.dtype], model.embedding.device
        places[HEAD] = floats = torch.empty(head.shape, dtype=dtype, device=device)
    read_stacked(plan, places, tell)
    if floats is not None:
        put_head(model, floats)


def _read_one_by_one(plan: Plan, model: "Mixtral", tell: Progress) -> None:
    """Any other form: a thread reads the next weight while this one quantises the last."""
    from serve_app.model.checkpoint.source import Source
    from serve_app.model.checkpoint.weight_mapping import put

    shapes = expected_shapes(plan.config, stacked=False)
    total, done = sum(prod(shape) for shape in shapes.values()), 0
    source = Source(plan)
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
    model: "Mixtral",
    dtype: "torch.dtype",
    quantization: Quantization | None,
    quantize_lm_head: bool = False,
) -> None:
    """Raises `ModelLoadFailed` where a part of `model` takes other than the promised memory."""
    absmax = None if quantization is None else quantization.absmax
    promised = weight_bytes(model.config, dtype.itemsize, absmax, quantize_lm_head)
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


def bytes_by_part(model: "Mixtral") -> dict[str, int]:
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
