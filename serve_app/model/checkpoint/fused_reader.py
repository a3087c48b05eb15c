"""Reads fused files (`fused.py`) with several threads, straight into the weights of a model.

The checksum of each piece is verified while the piece is read.
"""

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.fused import PIECE_BYTES, checksums
from serve_app.model.checkpoint.shards import Header, TensorInfo, damaged
from serve_app.model.checkpoint.source import DTYPES
from serve_app.model.checkpoint.tensor_names import CODEBOOK, LM_HEAD, module_weights
from serve_app.model.checkpoint.weight_mapping import module_weight
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantized_weight import QuantizedWeight

NUM_THREADS = 8
"""Number of concurrent reads: enough to keep a fast disk busy, and to compute checksums on 8
cores."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one file that are read with one call."""

    file: Path
    descriptor: int
    begin: int
    crc: int
    targets: list[Tensor]
    """The destinations of the bytes, one after the other: flat, contiguous uint8 tensors. Bytes for
    a tensor on "meta" are skipped."""

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)

    @property
    def device(self) -> torch.device | None:
        """The device of the targets; None if all of them are on "meta"."""
        devices = (target.device for target in self.targets if not target.is_meta)
        return next(devices, None)


@dataclass(frozen=True, slots=True)
class Reads:
    """The running reads of one file."""

    pieces: list[Future[int]]
    conversions: list[tuple[Tensor, Tensor]]
    """Pairs of a tensor that is read and the model's tensor, if their dtypes differ."""

    def finish(self, report: Callable[[int], None]) -> None:
        """Waits for all pieces, and calls `report` with the bytes of each."""
        for piece in self.pieces:
            report(piece.result())
        for source, target in self.conversions:
            target.copy_(source)


def fused_targets(model: Mixtral) -> dict[str, Tensor]:
    """Returns the tensors of `model` by their names in a fused checkpoint.

    An lm_head in 4 bits is left out, because the files have it in floats.
    """
    assert model.codebook is not None
    targets = {f"{CODEBOOK}.{name}": table for name, table in model.codebook.named_buffers()}
    for entry in module_weights(model.config):
        weight = module_weight(model, entry.path)
        if not isinstance(weight, QuantizedWeight):
            targets[entry.fused_name] = weight
        elif entry.fused_name != LM_HEAD:
            buffers = weight.named_buffers(recurse=False)
            targets |= {f"{entry.fused_name}.{name}": buffer for name, buffer in buffers}
    return targets


def read_files(
    headers: Mapping[Path, Header],
    targets: Mapping[str, Tensor],
    report: Callable[[int], None],
) -> None:
    """Fills `targets`, tensors by their name in the files. Skips tensors of the files without a
    target.

    If the dtypes of target and file differ, the values are rounded; otherwise the bytes are copied.
    The calling thread calls `report` with the bytes of each finished piece. Raises
    `ModelLoadFailed` if a file cannot be read or its checksums are wrong.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(NUM_THREADS, "read-weights"))
        stack.callback(pool.shutdown, cancel_futures=True)
        staging = threading.local()
        in_progress: deque[Reads] = deque()
        for file, header in headers.items():
            buffers = {
                name: _buffer(tensor, targets.get(name)) for name, tensor in header.tensors.items()
            }
            pieces = list(_pieces(stack, file, header, buffers))
            reads = [pool.submit(_read, piece, staging) for piece in pieces]
            read_buffers = {name: tensor for name, tensor in buffers.items() if name in targets}
            converted = [(tensor, targets[name]) for name, tensor in read_buffers.items()]
            converted = [(tensor, target) for tensor, target in converted if tensor is not target]
            in_progress.append(Reads(reads, converted))
            # Two files at a time: the reads of a file end while those of the next file start, and
            # few buffers are needed.
            if len(in_progress) > 1:
                in_progress.popleft().finish(report)
        while in_progress:
            in_progress.popleft().finish(report)


def _buffer(tensor: TensorInfo, target: Tensor | None) -> Tensor:
    """Returns `target`, or a buffer if its dtype or layout differs; a "meta" tensor for None."""
    dtype = DTYPES[tensor.dtype]
    if target is None:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")
    if target.dtype == dtype and target.is_contiguous():
        return target
    return torch.empty(tensor.shape, dtype=dtype, device=target.device)


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
    """Reads one piece in a thread of the pool. Returns the number of its bytes."""
    if (device := piece.device) is None:
        return piece.nbytes
    on_cpu = device.type == "cpu"
    buffers = (
        [_pinned(staging)[: piece.nbytes]]
        if not on_cpu
        else [
            torch.empty(len(target), dtype=torch.uint8) if target.is_meta else target
            for target in piece.targets
        ]
    )
    views = [buffer.numpy().data for buffer in buffers]
    _fill(piece, views)
    crc = 0
    for view in views:
        crc = zlib.crc32(view, crc)
    if crc != piece.crc:
        raise damaged(
            piece.file,
            f"the checksum of {piece.nbytes} bytes from offset {piece.begin} is wrong",
        )
    if not on_cpu:
        begin = 0
        for target in piece.targets:
            if not target.is_meta:
                target.copy_(buffers[0][begin : begin + len(target)], non_blocking=True)
            begin += len(target)
        torch.cuda.current_stream(device).synchronize()
    return piece.nbytes


def _fill(piece: Piece, views: list[memoryview]) -> None:
    offset = piece.begin
    while views:
        try:
            count = os.preadv(piece.descriptor, views, offset)
        except OSError as error:
            raise ModelLoadFailed(f"{piece.file}: cannot be read ({error.strerror}).") from None
        if count == 0:
            raise damaged(piece.file, "it was truncated while it was read")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views[0])
            views = views[1:]
        if views and count:
            views = [views[0][count:], *views[1:]]


def _pinned(staging: threading.local) -> Tensor:
    """Returns this thread's buffer in pinned memory, from which copies to a GPU are
    asynchronous."""
    if not hasattr(staging, "buffer"):
        staging.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
    buffer: Tensor = staging.buffer
    return buffer
