"""A checkpoint's folder becomes a model on a device, tensor by tensor.

Peak memory is the model plus one tensor. Everything that can be wrong with the files is found by
`inspect` before the first weight is read; afterwards the bytes in memory are compared with what the
quantisation promises. Knows no settings.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint import PARTS, Plan, inspect
from serve_app.model.config import MixtralConfig
from serve_app.model.find import find_checkpoint
from serve_app.model.footprint import BLOCK, weight_bytes
from serve_app.model.stacked import Quantization

# `serve_app.check` uses `inspect` and must answer before torch is even imported.
if TYPE_CHECKING:
    import torch

    from serve_app.model.mixtral import Mixtral

__all__ = ["Plan", "Quantization", "bytes_by_part", "find_checkpoint", "inspect", "load"]

TOLERANCE = 0.02
"""Share of a part's promised bytes that the loaded ones may differ by."""

Progress = Callable[[str, float], None]
"""Called with a phase's name and how much of it is done, from 0 to 1."""


def load(
    path: Path,
    *,
    dtype: "torch.dtype",
    device: "torch.device",
    quantization: Quantization | None = None,
    progress: Progress | None = None,
) -> "Mixtral":
    """The model in folder `path`, in `dtype` on `device`, its large matrices in 4 bits if wished.

    Float tensors are quantised one by one on `device`. A checkpoint that is quantised already keeps
    its own absmax; its type must be the one that `quantization` asks for.
    Raises `ModelLoadFailed` as `inspect` does, when a file changes under our hands, and when the
    loaded weights take other than the promised memory.
    """
    import torch

    from serve_app.model.mixtral import Mixtral

    tell = progress or (lambda phase, done: None)
    tell("checkpoint", 0.0)
    plan = inspect(path)
    quantization = agreed(plan, quantization)
    tell("checkpoint", 1.0)
    with torch.device("meta"):
        model = Mixtral(plan.config, quantization).to(dtype)
    model.to_empty(device=device)
    model.rope.fill()
    _read_floats(plan, model, tell)
    check_bytes(model, dtype, quantization)
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
        _require_whole_blocks(plan.config)
    return stored or wished


def _require_whole_blocks(config: MixtralConfig) -> None:
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads` x `head_dim": config.num_heads * config.head_dim,
    }
    for key, width in widths.items():
        if width % BLOCK:
            raise ModelLoadFailed(
                f"config.json: `{key}` is {width}, and 4-bit matrices need a multiple of {BLOCK}; "
                "set `model.quantization` to none."
            )


def _read_floats(plan: Plan, model: "Mixtral", tell: Progress) -> None:
    """Puts the float tensors of the files into `model`, tensor by tensor."""
    from safetensors import SafetensorError, safe_open

    from serve_app.model.place import put

    total = sum(plan.parameters.values())
    done = 0
    files: dict[Path, list[str]] = {}
    for name, tensor in plan.tensors.items():
        files.setdefault(tensor.file, []).append(name)
    for file, names in files.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as weights:
                for name in names:
                    weight = weights.get_tensor(name)
                    put(model, name, weight)
                    done += weight.numel()
                    tell("weights", done / total)
        except (OSError, SafetensorError) as error:
            raise ModelLoadFailed(f"{file}: cannot be read ({error}).") from None


def check_bytes(model: "Mixtral", dtype: "torch.dtype", quantization: Quantization | None) -> None:
    """Raises `ModelLoadFailed` where a part of `model` takes other than the promised memory."""
    absmax = None if quantization is None else quantization.absmax
    promised = weight_bytes(model.config, dtype.itemsize, absmax)
    promised["other"] += model.rope.cos.nbytes + model.rope.sin.nbytes
    name = str(dtype).removeprefix("torch.") if quantization is None else quantization.quant_type
    for part, loaded in bytes_by_part(model).items():
        if abs(loaded - promised[part]) > TOLERANCE * promised[part]:
            raise ModelLoadFailed(
                f"The weights of `{part}` take {loaded:,} bytes of memory where {name} takes "
                f"{promised[part]:,}: they are not all quantised; this is a fault of the server."
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
    return "head" if name in ("embedding", "head") else "other"
