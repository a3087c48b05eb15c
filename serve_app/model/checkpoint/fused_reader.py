"""Reads our own checkpoint, see `stacked`: several threads, each piece straight into its place.

Every piece is compared with its checksum as it passes.
"""

import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.fused import PIECE_BYTES, checksums
from serve_app.model.checkpoint.shards import Header, TensorInfo, damaged
from serve_app.model.checkpoint.source import DTYPES
from serve_app.model.experts4 import Experts4
from serve_app.model.linear import Linear
from serve_app.model.matrices4 import Linear4
from serve_app.model.mixtral import Block, Mixtral

NUM_THREADS = 8
"""Reads under way at once: enough to keep a fast disk busy, and checksums on as many cores."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file that are read at once."""

    file: Path
    descriptor: int
    begin: int
    crc: int
    targets: list[Tensor]
    """uint8, flat, contiguous: where the bytes go, one after the other."""

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


def fused_places(model: Mixtral) -> dict[str, Tensor]:
    """Where each tensor of such a checkpoint is in a model of the same quantisation.

    Without the head where the model has it in 4 bits: the files have floats.
    """
    places: dict[str, Tensor] = {
        "model.embed_tokens.weight": model.embedding,
        "model.norm.weight": model.norm.weight,
    }
    if isinstance(model.head, Linear):
        places["lm_head.weight"] = model.head.weight
    assert model.codes is not None
    modules: dict[str, nn.Module] = {"quantization": model.codes}
    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        layer, attention, mlp = f"model.layers.{i}", block.attention, block.mlp
        assert isinstance(mlp.experts, Experts4)
        assert isinstance(attention.qkv, Linear4)
        assert isinstance(attention.o, Linear4)
        modules[f"{layer}.mlp.experts.gate_up"] = mlp.experts.gate_up
        modules[f"{layer}.mlp.experts.down"] = mlp.experts.down
        modules[f"{layer}.self_attn.qkv"] = attention.qkv.matrix
        modules[f"{layer}.self_attn.o"] = attention.o.matrix
        places[f"{layer}.mlp.gate.weight"] = mlp.router
        places[f"{layer}.input_layernorm.weight"] = block.attention_norm.weight
        places[f"{layer}.post_attention_layernorm.weight"] = block.mlp_norm.weight
    for prefix, module in modules.items():
        for name, buffer in module.named_buffers(recurse=False):
            places[f"{prefix}.{name}"] = buffer
    return places


def read_fused(
    checkpoint: Checkpoint, places: Mapping[str, Tensor], progress: Callable[[float], None]
) -> None:
    """Fills `places`, a tensor of the right shape for every one of `checkpoint.tensors`.

    A place whose dtype is another than the file's gets the values, converted; all others get the
    bytes. `progress` hears, in the calling thread, how much is done, from 0 to 1.
    Raises `ModelLoadFailed` when a file cannot be read or is not what was written.
    """
    targets = {name: _target(checkpoint.tensors[name], place) for name, place in places.items()}
    with ExitStack() as stack:
        pieces = [
            piece
            for file, header in checkpoint.headers.items()
            for piece in _pieces(stack, file, header, targets)
        ]
        total, done = sum(piece.nbytes for piece in pieces), 0
        pool = stack.enter_context(ThreadPoolExecutor(NUM_THREADS, "read-weights"))
        stack.callback(pool.shutdown, cancel_futures=True)
        staging = threading.local()
        reads = [pool.submit(_read, piece, staging) for piece in pieces]
        for read in as_completed(reads):
            done += read.result()
            progress(done / total)
    for name, place in places.items():
        if targets[name] is not place:
            place.copy_(targets[name])


def _target(tensor: TensorInfo, place: Tensor) -> Tensor:
    """`place`, or a tensor to copy to it when the bytes cannot go there."""
    dtype = DTYPES[tensor.dtype]
    if place.dtype == dtype and place.is_contiguous():
        return place
    return torch.empty(tensor.shape, dtype=dtype, device=place.device)


def _pieces(
    stack: ExitStack, file: Path, header: Header, targets: Mapping[str, Tensor]
) -> Iterator[Piece]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise ModelLoadFailed(f"{file}: cannot be read ({error.strerror}).") from None
    stack.callback(os.close, descriptor)
    begin, parts, filled = header.data_begin, list[Tensor](), 0
    sums = iter(checksums(file, header))
    ordered = sorted(header.tensors.values(), key=lambda tensor: tensor.begin)
    for tensor in ordered:
        rest = targets[tensor.name].detach().view(-1).view(torch.uint8)
        while len(rest):
            part, rest = rest[: PIECE_BYTES - filled], rest[PIECE_BYTES - filled :]
            parts.append(part)
            filled += len(part)
            if filled == PIECE_BYTES or (tensor is ordered[-1] and not len(rest)):
                yield Piece(file, descriptor, begin, next(sums), parts)
                begin, parts, filled = begin + filled, [], 0


def _read(piece: Piece, staging: threading.local) -> int:
    """Reads one piece, in a thread of the pool; returns its bytes."""
    on_cpu = all(target.device.type == "cpu" for target in piece.targets)
    buffers = piece.targets if on_cpu else [_pinned(staging)[: piece.nbytes]]
    views = [buffer.numpy().data for buffer in buffers]
    _fill(piece, views)
    crc = 0
    for view in views:
        crc = zlib.crc32(view, crc)
    if crc != piece.crc:
        raise damaged(
            piece.file,
            f"the checksum of the {piece.nbytes} bytes from {piece.begin} on is wrong",
        )
    if not on_cpu:
        begin = 0
        for target in piece.targets:
            target.copy_(buffers[0][begin : begin + len(target)], non_blocking=True)
            begin += len(target)
        torch.cuda.current_stream(piece.targets[0].device).synchronize()
    return piece.nbytes


def _fill(piece: Piece, views: list[memoryview]) -> None:
    offset = piece.begin
    while views:
        try:
            count = os.preadv(piece.descriptor, views, offset)
        except OSError as error:
            raise ModelLoadFailed(f"{piece.file}: cannot be read ({error.strerror}).") from None
        if count == 0:
            raise damaged(piece.file, "it became shorter while it was read")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views[0])
            views = views[1:]
        if views and count:
            views = [views[0][count:], *views[1:]]


def _pinned(staging: threading.local) -> Tensor:
    """This thread's buffer of page-locked memory, from which a GPU copies by itself."""
    if not hasattr(staging, "buffer"):
        staging.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    buffer: Tensor = staging.buffer
    return buffer
