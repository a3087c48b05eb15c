"""Our own checkpoint: Mixtral in 4 bits, few large tensors that are read straight into place.

What `serve_app.convert` writes and `stacked_reader` reads: safetensors, one file per layer and one
for the rest, whose bytes are those that `model.nf4` holds in memory. `quantization_config` in
config.json marks it and says how it is quantised; each file's `__metadata__` has the CRC-32 of
every piece of `PIECE_BYTES` of its data. Reads no weights and imports no torch.
"""

from math import prod
from pathlib import Path

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.shards import ITEM_BYTES, Header, TensorInfo, damaged
from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import (
    ABSMAX_DTYPES,
    GROUP_SIZE,
    NUM_CODES,
    NUM_NESTED_CODES,
    Quantization,
    num_nested_groups,
)

PIECE_BYTES = 16 << 20
"""Data that one checksum covers and one read fetches."""
CHECKSUMS = "crc32"
"""Key of a file's metadata: the checksums of its pieces, 8 hexadecimal digits each."""
SOURCE = "source"
"""Key of a file's metadata: what it was converted from, see `serve_app.convert`."""
FLOATS = ("F32", "BF16", "F16")


def require_whole_groups(config: MixtralConfig) -> None:
    """Raises `ModelLoadFailed` for sizes that 4 bits cannot have."""
    columns = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_heads * config.head_dim,
    }
    for key, size in columns.items():
        if size % GROUP_SIZE:
            raise ModelLoadFailed(
                f"config.json: `{key}` ({size}) must be a multiple of {GROUP_SIZE} to be quantised."
            )


def fused_tensors(
    config: MixtralConfig, quantization: Quantization
) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Possible dtypes, and shape, of every tensor by its name, in the order of the files.

    gate_up has the rows of gate (w1) and up (w3) interleaved in groups of 8; their double
    quantisation stays apart, as does that of q, k and v in qkv.
    """
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tensors: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {}
    absmax_dtype = ABSMAX_DTYPES[quantization.absmax]

    def add(name: str, lead: tuple[int, ...], rows: tuple[int, ...], columns: int) -> None:
        """A stack `lead` of matrices that are made of matrices with these `rows`."""
        whole = (*lead, sum(rows))
        tensors[f"{name}.packed"] = ("U8",), (*whole, columns // 2)
        tensors[f"{name}.absmax"] = (
            (absmax_dtype,),
            (*whole, columns // GROUP_SIZE),
        )
        if quantization.absmax == "nested":
            groups = sum(num_nested_groups(count * columns) for count in rows)
            tensors[f"{name}.nested_absmax"] = ("F32",), (*lead, groups)
            tensors[f"{name}.nested_offset"] = ("F32",), (*lead, len(rows))

    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        add(f"{layer}.mlp.experts.gate_up", (experts,), (inner, inner), hidden)
        add(f"{layer}.mlp.experts.down", (experts,), (hidden,), inner)
        add(f"{layer}.self_attn.qkv", (), (q, kv, kv), hidden)
        add(f"{layer}.self_attn.o", (), (hidden,), q)
        tensors[f"{layer}.mlp.gate.weight"] = FLOATS, (experts, hidden)
        tensors[f"{layer}.input_layernorm.weight"] = FLOATS, (hidden,)
        tensors[f"{layer}.post_attention_layernorm.weight"] = FLOATS, (hidden,)
    tensors["model.embed_tokens.weight"] = FLOATS, (config.vocab_size, hidden)
    if not config.tie_embeddings:
        tensors["lm_head.weight"] = FLOATS, (config.vocab_size, hidden)
    tensors["model.norm.weight"] = FLOATS, (hidden,)
    tensors["quantization.code"] = ("F32",), (NUM_CODES,)
    if quantization.absmax == "nested":
        tensors["quantization.nested_code"] = ("F32",), (NUM_NESTED_CODES,)
    return tensors


def file_names(num_layers: int) -> list[str]:
    """The files of a checkpoint: one for each layer, one for the rest."""
    total = num_layers + 1
    return [f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]


def fused_bytes(config: MixtralConfig, quantization: Quantization, float_bytes: int) -> int:
    """Bytes of such a checkpoint, but for its headers; of a float weight `float_bytes`."""
    return sum(
        prod(shape) * (float_bytes if dtypes == FLOATS else ITEM_BYTES[dtypes[0]])
        for dtypes, shape in fused_tensors(config, quantization).values()
    )


def match_fused(
    path: Path, config: MixtralConfig, quantization: Quantization, found: dict[str, TensorInfo]
) -> None:
    """Raises `ModelLoadFailed` unless `found` is exactly what such a checkpoint has."""
    expected = fused_tensors(config, quantization)
    for name, (dtypes, shape) in expected.items():
        if name not in found:
            raise ModelLoadFailed(f"{path}: no file holds tensor `{name}`, which the model needs.")
        tensor = found[name]
        if tensor.shape != shape or tensor.dtype not in dtypes:
            raise ModelLoadFailed(
                f"{tensor.file}: tensor `{name}` is {tensor.dtype} {list(tensor.shape)}, and "
                f"config.json asks for {' or '.join(dtypes)} {list(shape)}."
            )
    for name, tensor in found.items():
        if name not in expected:
            raise ModelLoadFailed(f"{tensor.file}: tensor `{name}` is no part of a Mixtral.")


def checksums(file: Path, header: Header) -> list[int]:
    """CRC-32 of each piece of a file's data; raises `ModelLoadFailed` when they are not there."""
    try:
        numbers = [int(digits, 16) for digits in header.metadata[CHECKSUMS].split()]
    except (KeyError, ValueError, AttributeError):
        raise damaged(file, "its checksums are missing") from None
    end = max((tensor.begin + tensor.nbytes for tensor in header.tensors.values()), default=0)
    if len(numbers) != -(-(end - header.data_begin) // PIECE_BYTES):
        raise damaged(file, "its checksums are incomplete")
    return numbers
