"""What lies in a checkpoint's folder, from its JSON and the safetensors headers alone.

`inspect` finds in milliseconds everything that would make a load fail, and says it in one sentence.
Reads no weights and imports no torch.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed
from serve_app.model.config import MixtralConfig

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the safetensors dtypes that a float checkpoint can have."""
PARTS = ("experts", "attention", "head", "other")
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor is, and what."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """A checkpoint that can be loaded."""

    path: Path
    config: MixtralConfig
    tensors: dict[str, TensorInfo]
    """Those that the model needs, by their name in the files, file by file."""

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of each of `PARTS`; "head" is the embedding matrix and the output head."""
        counts = dict.fromkeys(PARTS, 0)
        for name, tensor in self.tensors.items():
            counts[_part(name)] += prod(tensor.shape)
        return counts

    def weight_bytes(self, item_bytes: int) -> dict[str, int]:
        """Bytes of each part when every parameter takes `item_bytes` (2 for bfloat16)."""
        return {part: count * item_bytes for part, count in self.parameters.items()}


def inspect(path: Path) -> Plan:
    """What a load of the folder `path` would do; `ModelLoadFailed` says why it would fail."""
    if not path.is_dir():
        raise ModelLoadFailed(f"{path}: there is no such folder; `model.name` must name one.")
    config = MixtralConfig.from_dict(_read_json(path / "config.json"))
    found: dict[str, TensorInfo] = {}
    for file in shard_files(path):
        for name, tensor in read_header(file).items():
            if name in found:
                raise ModelLoadFailed(f"{file}: tensor `{name}` is also in {found[name].file}.")
            found[name] = tensor
    return Plan(path, config, _match(path, config, found))


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the index's order; all of them exist."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not index.exists():
        if single.exists():
            return [single]
        raise ModelLoadFailed(_why_no_weights(path))
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadFailed(f"{index}: `weight_map` is missing.")
    files = []
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelLoadFailed(f"{index}: `weight_map` names {name!r}, which is no file here.")
        if not (path / name).exists():
            raise ModelLoadFailed(
                f"{path / name}: the file is missing, though `weight_map` in {index.name} names "
                "it; download the checkpoint again."
            )
        files.append(path / name)
    return files


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file; raises `ModelLoadFailed` when it is not whole.

    The format: 8 bytes little-endian length, that many bytes of JSON, then the data
    (https://huggingface.co/docs/safetensors).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelLoadFailed(_truncated(file, "its header is cut off"))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        if (promised := 8 + length + max(ends, default=0)) != size:
            reason = f"it has {size} bytes and its header promises {promised}"
            raise ModelLoadFailed(_truncated(file, reason))
        return {name: _tensor(file, name, entry) for name, entry in header.items()}
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelLoadFailed(_truncated(file, "its header is no safetensors header")) from None


def expected_shapes(config: MixtralConfig, *, stacked: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint.

    `stacked`: experts as transformers 5 has them in memory, rather than one by one.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if stacked:
            shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
            shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
            shapes[f"{layer}.mlp.experts.down_proj"] = (experts, hidden, inner)
            continue
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            prefix = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes[f"{prefix}.w1.weight"] = (inner, hidden)
            shapes[f"{prefix}.w2.weight"] = (hidden, inner)
            shapes[f"{prefix}.w3.weight"] = (inner, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _match(
    path: Path, config: MixtralConfig, found: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    stacked = any(".mlp.experts." in name for name in found)
    expected = expected_shapes(config, stacked=stacked)
    for name, shape in expected.items():
        if name not in found:
            raise ModelLoadFailed(f"{path}: no file holds tensor `{name}`, which the model needs.")
        tensor = found[name]
        if tensor.shape != shape:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` has shape {list(tensor.shape)}, and config.json "
                f"asks for {list(shape)}."
            )
        if tensor.dtype not in ITEM_BYTES:
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


def _part(name: str) -> str:
    if ".experts." in name:
        return "experts"
    if ".self_attn." in name:
        return "attention"
    return "head" if "embed_tokens" in name or "lm_head" in name else "other"


def _tensor(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or (dtype in ITEM_BYTES and end - begin != prod(shape) * ITEM_BYTES[dtype]):
        raise ModelLoadFailed(_truncated(file, f"the offsets of tensor `{name}` are wrong"))
    return TensorInfo(file, dtype, shape)


def _truncated(file: Path, reason: str) -> str:
    return f"{file}: is damaged or half downloaded ({reason}); download it again."


def _why_no_weights(path: Path) -> str:
    pickles = sorted(
        file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in path.glob(kind)
    )
    if pickles:
        return (
            f"{path / pickles[0]}: pickled weights can run code when they are loaded and are "
            "refused; convert the checkpoint to safetensors."
        )
    return f"{path}: has neither model.safetensors nor model.safetensors.index.json."


def _read_json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadFailed(f"{file}: is missing.") from None
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None
    except ValueError:
        raise ModelLoadFailed(f"{file}: is not valid JSON.") from None
    if not isinstance(document, dict):
        raise ModelLoadFailed(f"{file}: must hold a JSON object.")
    return document
