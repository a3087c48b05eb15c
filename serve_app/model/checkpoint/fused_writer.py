"""Writes our own checkpoint, see `stacked`: one file per layer, one for the rest.

A file appears under its name when it is whole and on the disk, never before. Knows no command line
and no config.json.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from serve_app.model.checkpoint.fused import CHECKSUMS, PIECE_BYTES, SOURCE
from serve_app.model.checkpoint.source import DTYPES, Source
from serve_app.model.experts4 import Experts4
from serve_app.model.matrices4 import Codes, Linear4

ALIGNMENT = 4096
"""Data begins at a multiple of this, so that it can be read without the page cache."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def layer_tensors(source: Source, layer: int, codes: Codes) -> dict[str, Tensor]:
    """Everything that the file of one layer holds; 4-bit weights on the device of `codes`."""
    config, prefix = source.checkpoint.config, f"model.layers.{layer}"
    tensors: dict[str, Tensor] = {}
    with codes.code.device:
        experts = Experts4(config, codes)
    for expert in range(config.num_experts):
        for stored, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            weight = f"{prefix}.block_sparse_moe.experts.{expert}.{stored}.weight"
            experts.put(expert, name, source.weight(weight))
    _add(tensors, f"{prefix}.mlp.experts.gate_up", experts.gate_up)
    _add(tensors, f"{prefix}.mlp.experts.down", experts.down)
    heads = config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    with codes.code.device:
        qkv = Linear4(codes, config.hidden_size, (heads, keys, keys))
        o = Linear4(codes, heads, (config.hidden_size,))
    for part, one in enumerate("qkv"):
        qkv.put(part, source.weight(f"{prefix}.self_attn.{one}_proj.weight"))
    o.put(0, source.weight(f"{prefix}.self_attn.o_proj.weight"))
    _add(tensors, f"{prefix}.self_attn.qkv", qkv.matrix)
    _add(tensors, f"{prefix}.self_attn.o", o.matrix)
    router = f"{prefix}.block_sparse_moe.gate.weight"
    tensors[f"{prefix}.mlp.gate.weight"] = source.float(router)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}.{norm}.weight"] = source.float(f"{prefix}.{norm}.weight")
    return tensors


def other_tensors(source: Source, codes: Codes) -> dict[str, Tensor]:
    """Everything that belongs to no layer."""
    config = source.checkpoint.config
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not config.tie_embeddings:
        names.append("lm_head.weight")
    tensors = {name: source.float(name) for name in names}
    with codes.code.device:  # any matrix brings the tables, and the layers may be written already
        keys = Linear4(codes, config.hidden_size, (config.num_kv_heads * config.head_dim,))
    keys.put(0, source.weight("model.layers.0.self_attn.k_proj.weight"))
    _add(tensors, "quantization", codes)
    return tensors


def write_file(file: Path, tensors: dict[str, Tensor], source: str) -> None:
    """Writes `file`, whose metadata says that it was made from `source`.

    Raises `OSError`; what was there under that name before is then still there.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].nbytes)
    header, begin = {}, 0
    for name, tensor in ordered:
        offsets = [begin, begin + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        begin += tensor.nbytes
    sums = " ".join(f"{crc:08x}" for crc in _checksums([tensor for _, tensor in ordered]))
    text = json.dumps({"__metadata__": {CHECKSUMS: sums, SOURCE: source}, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            stream.write(_bytes(tensor))
        stream.flush()
        os.fsync(stream.fileno())
    put_in_place(partial, file)


def write_bytes(file: Path, data: bytes) -> None:
    """Writes a small file in the same way as `write_file`."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    put_in_place(partial, file)


def put_in_place(partial: Path, file: Path) -> None:
    """Gives a file that is on the disk its name, on the disk too."""
    partial.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _add(tensors: dict[str, Tensor], prefix: str, module: nn.Module) -> None:
    """Adds the module's own buffers: they are what the file has."""
    for name, buffer in module.named_buffers(recurse=False):
        tensors[f"{prefix}.{name}"] = buffer


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data


def _checksums(tensors: list[Tensor]) -> Iterator[int]:
    """CRC-32 of each `PIECE_BYTES` of the tensors, end to end."""
    crc, filled = 0, 0
    for tensor in tensors:
        data = _bytes(tensor)
        while data:
            part, data = data[: PIECE_BYTES - filled], data[PIECE_BYTES - filled :]
            crc, filled = zlib.crc32(part, crc), filled + len(part)
            if filled == PIECE_BYTES:
                yield crc
                crc, filled = 0, 0
    if filled:
        yield crc
