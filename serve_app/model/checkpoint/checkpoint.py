"""Checkpoint: the contents of a checkpoint's folder, from config.json and safetensors headers only.

`inspect` takes milliseconds, and raises a one-sentence error if a load would fail. `loader.load`,
`convert` and the checks use the `Checkpoint` that it returns and read neither config.json nor a
header again. This module reads no weights and imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.bnb4 import PackedInfo, take_packed
from serve_app.model.checkpoint.form import (
    Form,
    fused_version,
    stored_form,
    stored_quantization,
)
from serve_app.model.checkpoint.fused import match_fused, require_whole_groups
from serve_app.model.checkpoint.other_formats import describe_tensors
from serve_app.model.checkpoint.shards import (
    FLOATS,
    Header,
    TensorInfo,
    no_weights,
    read_header,
    read_json,
    shard_files,
)
from serve_app.model.checkpoint.tensor_names import (
    is_merged,
    is_redundant,
    merged_shapes,
    weights,
)
from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import Quantization


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be loaded. `from_config` fills only the fields that config.json
    determines."""

    path: Path
    document: Mapping[str, Any]
    """The parsed config.json."""
    config: MixtralConfig
    form: Form
    quantization: Quantization | None
    """The storage of experts and attention in the files; None if all of them are floats."""
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    """The tensors that the model needs, by name, in the order of the files. In bitsandbytes' form,
    only the tensors that are not quantized."""
    packed: dict[str, PackedInfo] = field(default_factory=dict)
    """The quantized weights of bitsandbytes' form, by the name of their float tensor."""
    headers: dict[Path, Header] = field(default_factory=dict)
    """The header of every safetensors file; empty for a checkpoint that is still on the hub."""

    @classmethod
    def from_config(cls, path: Path, document: Mapping[str, Any]) -> "Checkpoint":
        """Returns the checkpoint that a parsed config.json describes, without its files.

        `path` is named in errors. Raises `ModelLoadFailed` for a model or a form that cannot be
        served.
        """
        config = MixtralConfig.from_dict(document)
        return cls(path, document, config, stored_form(document), stored_quantization(document))

    @property
    def file_bytes(self) -> int:
        """Bytes of all tensors in the files."""
        tensors = [t for header in self.headers.values() for t in header.tensors.values()]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def float_modules(self) -> frozenset[str]:
        """Experts and attention of single layers that have float weights although the model is
        quantized.

        The elements are the `Weight.module` of each such weight. bitsandbytes' form contains them
        if `llm_int8_skip_modules` named them.
        """
        if self.form != "bitsandbytes" or not self.packed:
            return frozenset()
        quantized = (weight for weight in weights(self.config).values() if weight.is_quantized)
        return frozenset(weight.module for weight in quantized if weight.name not in self.packed)

    def notes(self) -> list[str]:
        """Returns notes for users about weights whose form in memory differs from bitsandbytes'
        form in the files."""
        if not self.packed:
            return []
        by_name, notes = weights(self.config), []
        to_floats = [by_name[name] for name in self.packed if not by_name[name].is_quantized]
        if to_floats:
            paths = [weight.path.removesuffix(".weight") for weight in to_floats]
            modules = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            notes.append(f"{modules}: in 4 bits in the checkpoint, held as floats")
        names = [module.rpartition(".")[2] for module in self.float_modules]
        total = self.config.num_hidden_layers
        for part in sorted(set(names)):
            where = f"{part} in {names.count(part)} of {total} layers"
            notes.append(f"{where}: has floats in the checkpoint, held as floats")
        return notes

    def resolve_quantization(
        self, requested: Quantization | None, quantize_lm_head: bool = False
    ) -> Quantization | None:
        """Returns the quantization of the model in memory; None for floats.

        `requested` applies to float weights. Raises `ModelLoadFailed` if the files do not allow it.
        """
        stored = self.quantization
        if stored is not None and (requested is None or requested.quant_type != stored.quant_type):
            raise ModelLoadFailed(
                f"{self.path}: the weights are already {stored.quant_type}; set "
                f"`model.quantization` to {stored.quant_type}, or name the float checkpoint that "
                "they were made from."
            )
        if requested is not None:
            require_whole_groups(self.config)
        if quantize_lm_head:
            self._require_lm_head(requested)
        chosen = stored or requested
        return None if chosen is None else chosen.in_memory

    def _require_lm_head(self, requested: Quantization | None) -> None:
        if requested is None:
            raise ModelLoadFailed(
                "`model.quantize_lm_head` needs a `model.quantization` other than none."
            )
        if self.config.tie_word_embeddings:
            raise ModelLoadFailed(
                "`model.quantize_lm_head`: this model has no lm_head, because it uses the "
                "embedding matrix instead; set `model.quantize_lm_head` to false."
            )


def inspect(path: Path) -> Checkpoint:
    """Returns the checkpoint in folder `path`. Raises `ModelLoadFailed` if it cannot be loaded."""
    if not path.is_dir():
        raise ModelLoadFailed(f"{path}: there is no such folder; `model.name` must name one.")
    if not (path / "config.json").exists():
        raise no_weights(path, "config.json")
    checkpoint = Checkpoint.from_config(path, read_json(path / "config.json"))
    headers = {file: read_header(file) for file in shard_files(path)}
    all_tensors = _merge(headers)
    config, form, quantization = checkpoint.config, checkpoint.form, checkpoint.quantization
    packed: dict[str, PackedInfo] = {}
    if form == "fused":
        assert quantization is not None
        version = fused_version(checkpoint.document)
        match_fused(path, config, quantization, version, headers, all_tensors)
        tensors = all_tensors
    else:
        if (quantized := describe_tensors(all_tensors)) is not None:
            raise ModelLoadFailed(f"{path}: the weights are {quantized}.")
        names = weights(config)
        packed = take_packed(all_tensors, names.values())
        kinds = {
            Quantization(info.quant_type, info.absmax_kind)
            for name, info in packed.items()
            if names[name].is_quantized
        }
        form, quantization = ("bitsandbytes", kinds.pop()) if kinds else ("float", None)
        tensors = _match(path, config, all_tensors, packed)
    return Checkpoint(
        path, checkpoint.document, config, form, quantization, tensors, packed, headers
    )


def _merge(headers: Mapping[Path, Header]) -> dict[str, TensorInfo]:
    """Returns the tensors of all files by name. Raises `ModelLoadFailed` if a name occurs twice."""
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise ModelLoadFailed(f"{file}: tensor `{name}` is also in {tensors[name].file}.")
            tensors[name] = tensor
    return tensors


def _match(
    path: Path,
    config: MixtralConfig,
    tensors: dict[str, TensorInfo],
    packed: dict[str, PackedInfo],
) -> dict[str, TensorInfo]:
    """Returns the float tensors that the model needs in addition to `packed`."""
    expected = {name: weight.shape for name, weight in weights(config).items()}
    if is_merged(config, tensors):
        expected = merged_shapes(config)
    for name, shape in expected.items():
        if name in packed:
            continue
        if name not in tensors:
            raise ModelLoadFailed(
                f"{path}: no file has the tensor `{name}`, which the model needs."
            )
        tensor = tensors[name]
        if tensor.shape != shape:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` has shape {list(tensor.shape)}, but config.json "
                f"requires {list(shape)}."
            )
        if tensor.dtype not in FLOATS:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` is {tensor.dtype}, but only float weights "
                "(F32, BF16, F16) can be loaded; name the checkpoint that it was made from."
            )
    for name, tensor in tensors.items():
        if name not in expected and not is_redundant(config, name):
            raise ModelLoadFailed(f"{tensor.file}: tensor `{name}` is not part of a Mixtral model.")
    return {name: tensor for name, tensor in tensors.items() if name in expected}
