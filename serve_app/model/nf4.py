"""Matrices in 4 bits, as bitsandbytes stores them (QLoRA, arXiv 2305.14314).

Each block of 64 values along a row is divided by its largest absolute value, `absmax`, and every
value becomes the nearest of 16 `code` values. absmax is kept as it is (float32), rounded
(bfloat16), or quantised to 8 bits itself ("nested": double quantisation). `quantize` gives bit for
bit what `bitsandbytes.functional.quantize_4bit` gives on a CPU, and needs no bitsandbytes.

Knows no model and no files. Letters: N rows, K columns, a multiple of 64; `...` is nothing for one
matrix, or the dimensions of a stack of them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.quantization import GROUP_SIZE, NESTED_GROUP_SIZE, AbsmaxKind, QuantType

CHUNK = 1 << 22
"""Weights that are computed at once: in float32 they are 16 MB, and several copies are needed."""
QUANTIZE_CHUNK = 1 << 20
"""The same where weights are quantised, which needs ten copies; a CPU is faster with less."""
SMALLEST = 1e-38
"""bitsandbytes divides by no absmax below this, so that a block of zeros stays zeros."""

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""The normal float: quantiles of a normal distribution."""
FP4_TWELFTHS = (0.0, 0.0625, 8, 12, 4, 6, 2, 3, 0.0, -0.0625, -8, -12, -4, -6, -2, -3)
"""The 4-bit float (sign, 2 bits of exponent, 1 of mantissa) in twelfths."""
# fmt: on


@dataclass(frozen=True)
class Nested:
    """absmax in 8 bits: value i of a matrix is `code[a8[i]] * absmax[i // 256] + offset`."""

    absmax: Tensor
    """float32 `[..., ceil(N * K / 64 / 256)]`"""
    code: Tensor
    """float32 `[256]`"""
    offset: Tensor
    """float32 `[...]`: the mean absmax, one for each matrix."""


@dataclass(frozen=True)
class Quantized:
    """One matrix, or a stack of matrices, in 4 bits."""

    packed: Tensor
    """uint8 `[..., N, K / 2]`: byte j of a row holds value 2j in its high nibble, 2j + 1 below."""
    absmax: Tensor
    """float32 or bfloat16 `[..., N, K / 64]`; uint8 where it is nested."""
    code: Tensor
    """float32 `[16]`: what each nibble means."""
    nested: Nested | None = None
    """absmax of the absmax, where that is uint8."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrices: `[..., N, K]`."""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, tables included."""
        tensors = [self.packed, self.absmax, self.code]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.code, self.nested.offset]
        return sum(tensor.nbytes for tensor in tensors)


def quantize(weight: Tensor, quant_type: QuantType, absmax: AbsmaxKind) -> Quantized:
    """`weight` `[..., N, K]`, a float tensor without NaN, in 4 bits on the device where it is.

    Matrices of a stack are quantised apart, as a checkpoint with a tensor per expert has them.
    """
    columns = weight.shape[-1]
    if columns % GROUP_SIZE:
        raise ValueError(f"rows of {columns} weights are no whole blocks of {GROUP_SIZE}")
    code = codes(quant_type, weight.device)
    values = weight.reshape(-1, columns)
    packed = values.new_empty(len(values), columns // 2, dtype=torch.uint8)
    scales = values.new_empty(len(values), columns // GROUP_SIZE, dtype=torch.float32)
    step = max(1, QUANTIZE_CHUNK // columns)
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        packed[part], scales[part] = _quantize_rows(values[part], code)
    packed = packed.view(*weight.shape[:-1], -1)
    scales = scales.view(*weight.shape[:-1], -1)
    if absmax == "nested":
        numbers, nested = quantize_absmax(scales)
        return Quantized(packed, numbers, code, nested)
    return Quantized(packed, scales.to(getattr(torch, absmax)), code)


def dequantize(q: Quantized, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrices `[..., N, K]`: code times absmax in float32, then rounded to `dtype`.

    Written into `out`, a contiguous tensor of that shape and dtype, where one is given.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    # Two values for each byte: one look-up instead of two, and no shifts.
    pairs = torch.stack((q.code.repeat_interleave(16), q.code.repeat(16)), dim=-1)
    pairs = pairs.view(torch.int64).flatten()  # [256], because gathering whole elements is faster
    columns = q.shape[-1]
    packed, scales = (
        q.packed.view(-1, columns // 2),
        plain_absmax(q.absmax, q.nested).view(-1, columns // GROUP_SIZE),
    )
    rows = out.view(-1, columns)
    step = max(1, CHUNK // columns)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = pairs.index_select(0, packed[part].flatten().int()).view(torch.float32)
        values = values.view(-1, GROUP_SIZE)
        values *= scales[part].reshape(-1, 1)
        rows[part] = values.view(-1, columns)
    return out


def plain_absmax(absmax: Tensor, nested: Nested | None) -> Tensor:
    """`absmax` `[..., N, K / 64]` as it multiplies: not nested any more."""
    if nested is None:
        return absmax
    flat = absmax.flatten(-2)
    num_blocks = flat.shape[-1]
    scales = nested.absmax.repeat_interleave(NESTED_GROUP_SIZE, dim=-1)[..., :num_blocks]
    values = nested.code[flat.int()] * scales + nested.offset[..., None]
    return values.view(absmax.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Nested]:
    """Float32 `absmax` `[..., N, K / 64]` in 8 bits, uint8, and what undoes it."""
    stack = absmax.flatten(-2).view(-1, absmax.shape[-2] * absmax.shape[-1])
    offset = torch.stack([matrix.mean() for matrix in stack])
    num_blocks = -(-stack.shape[1] // NESTED_GROUP_SIZE)
    padding = num_blocks * NESTED_GROUP_SIZE - stack.shape[1]
    blocks = F.pad(stack - offset[:, None], (0, padding)).view(len(stack), -1, NESTED_GROUP_SIZE)
    scales = blocks.abs().amax(dim=-1)
    is_flat = scales == 0
    scaled = (blocks * (1.0 / scales.masked_fill(is_flat, 1))[..., None]).clamp_(-1, 1)
    # bitsandbytes looks the nearest value up by the first 16 bits, not by the value itself.
    snapped = ((scaled + 1) * 0.5 * 65535 + 0.5).int().float() * 2 / 65535 - 1
    levels = dynamic_map(absmax.device)
    nearest = torch.bucketize(snapped, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    nearest = nearest.masked_fill_(is_flat[..., None], 0).to(torch.uint8)
    nested = Nested(scales.view(*absmax.shape[:-2], -1), levels, offset.view(absmax.shape[:-2]))
    return nearest.view(len(stack), -1)[:, : stack.shape[1]].reshape(absmax.shape), nested


def codes(quant_type: QuantType, device: torch.device | None = None) -> Tensor:
    """The 16 values of a quantisation: float32 `[16]`."""
    if quant_type == "nf4":
        return torch.tensor(NF4, device=device)
    return torch.tensor(FP4_TWELFTHS, device=device) / 12


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """The 256 values of 8-bit absmax, float32 ascending (dynamic tree, arXiv 1511.04561).

    0, 1, and per power of ten from 1e-6 to 1 twice as many fractions as for the one below.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * means).tolist()
        values += (-(10 ** (exponent - 6)) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _quantize_rows(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """packed `[n, K / 2]` and absmax `[n, K / 64]` of `values` `[n, K]`."""
    blocks = values.float().view(-1, GROUP_SIZE)
    absmax = blocks.abs().amax(dim=-1)
    # Times the reciprocal, not divided: bitsandbytes' rounding.
    scaled = (blocks * (1.0 / absmax.clamp(min=SMALLEST))[:, None]).clamp_(-1, 1)
    ascending, order = code.sort(stable=True)
    nearest = torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    nibbles = order.to(torch.uint8)[nearest].view(len(values), -1, 2)
    return nibbles[..., 0] << 4 | nibbles[..., 1], absmax.view(len(values), -1)
