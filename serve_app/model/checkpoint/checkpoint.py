"""What lies in a checkpoint's folder, from its JSON and the safetensors headers alone.

`inspect` finds in milliseconds everything that would make a load fail, and says it in one sentence.
Reads no weights and imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.bnb4 import PackedInfo, take_packed
from serve_app.model.checkpoint.fused import Quantization, checksums, match_stacked
from serve_app.model.checkpoint.shards import (
    Header,
    TensorInfo,
    read_header,
    read_json,
    shard_files,
)
from serve_app.model.config import Form, MixtralConfig, stored_form
from serve_app.model.footprint import PARTS, expected_shapes, parameters, weight_bytes

if TYPE_CHECKING:  # that module imports torch
    from serve_app.model.nf4 import AbsmaxKind

__all__ = ["PARTS", "Plan", "TensorInfo", "expected_shapes", "inspect"]

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Plan:
    """A checkpoint that can be loaded."""

    path: Path
    config: MixtralConfig
    form: Form
    tensors: dict[str, TensorInfo]
    """Those that the model needs, by their name in the files, file by file; of bitsandbytes' form
    only those that are not quantised."""
    packed: dict[str, PackedInfo] = field(default_factory=dict)
    """Bitsandbytes' form: the quantised weights, by the name that their float tensor has."""
    quantization: Quantization | None = None
    """How the quantised weights are; None where all are floats."""
    headers: dict[Path, Header] = field(default_factory=dict)
    """Of every file."""

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of each of `PARTS`; "head" is the embedding matrix and the output head."""
        return parameters(self.config)

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        tensors = [t for header in self.headers.values() for t in header.tensors.values()]
        return sum(tensor.nbytes for tensor in tensors)

    def weight_bytes(self, item_bytes: int, absmax: str | None = None) -> dict[str, int]:
        """Bytes of each part in memory, see `footprint.weight_bytes`."""
        return weight_bytes(self.config, item_bytes, absmax)


def inspect(path: Path) -> Plan:
    """What a load of the folder `path` would do; `ModelLoadFailed` says why it would fail."""
    if not path.is_dir():
        raise ModelLoadFailed(f"{path}: there is no such folder; `model.name` must name one.")
    document = read_json(path / "config.json")
    config, form = MixtralConfig.from_dict(document), stored_form(document)
    headers = {file: read_header(file) for file in shard_files(path)}
    found: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in found:
                raise ModelLoadFailed(f"{file}: tensor `{name}` is also in {found[name].file}.")
            found[name] = tensor
    if form == "stacked":
        quantization = Quantization.from_config(document["quantization_config"])
        match_stacked(path, config, quantization.absmax, found)
        for file, header in headers.items():
            checksums(file, header)
        return Plan(path, config, form, found, {}, quantization, headers)
    packed = {}
    if form == "bitsandbytes":
        packed = take_packed(found, expected_shapes(config, stacked=False))
    tensors = _match(path, config, found, packed)
    for one in packed.values():
        return Plan(
            path,
            config,
            form,
            tensors,
            packed,
            Quantization(one.quant_type, one.absmax_kind),
            headers,
        )
    return Plan(path, config, "float", tensors, headers=headers)


def stored_quantization(document: Mapping[str, Any]) -> Quantization | None:
    """What a parsed `config.json` says of its 4-bit weights, before any header is read.

    The files have the last word (`Plan.quantization`). Raises as `stored_form`.
    """
    form = stored_form(document)
    if form == "float":
        return None
    stored = document["quantization_config"]
    if form == "stacked":
        return Quantization.from_config(stored)
    absmax: AbsmaxKind = "nested" if stored.get("bnb_4bit_use_double_quant") else "float32"
    return Quantization("nf4" if stored.get("bnb_4bit_quant_type") == "nf4" else "fp4", absmax)


def _match(
    path: Path,
    config: MixtralConfig,
    found: dict[str, TensorInfo],
    packed: dict[str, PackedInfo],
) -> dict[str, TensorInfo]:
    """The float tensors that the model needs, apart from those that are `packed`."""
    stacked = any(".mlp.experts." in name for name in found)
    expected = expected_shapes(config, stacked=stacked)
    for name, shape in expected.items():
        if name in packed:
            continue
        if name not in found:
            raise ModelLoadFailed(f"{path}: no file holds tensor `{name}`, which the model needs.")
        tensor = found[name]
        if tensor.shape != shape:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` has shape {list(tensor.shape)}, and config.json "
                f"asks for {list(shape)}."
            )
        if tensor.dtype not in FLOATS:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` is {tensor.dtype}, and only float weights "
                "(F32, BF16, F16) can be loaded; name the checkpoint that it was made from."
            )
    for name, tensor in found.items():
        if name not in expected and not _is_redundant(name, config):
            raise ModelLoadFailed(f"{tensor.file}: tensor `{name}` is no part of a Mixtral.")
    return {name: tensor for name, tensor in found.items() if name in expected}


def _is_redundant(name: str, config: MixtralConfig) -> bool:
    """True for what old tools wrote besides the weights."""
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == "lm_head.weight"
    )
