"""Quantizes weights to 4 bits and dequantizes them, with the same bits as bitsandbytes on a CPU.

Each quantization group, 64 adjacent values of a row, is divided by its largest absolute value,
`absmax`. Then every value is replaced by the nearest of 16 code values (QLoRA, arXiv 2305.14314).
Example: the largest value of a group is -2.0, so its value 0.5 is scaled to 0.25. The nearest code
value of nf4 is 0.2461, with index 10. So its nibble is 10, and it is dequantized to 0.2461 * 2.0 =
0.4922.

`quantize` returns the same bits as `bitsandbytes.functional.quantize_4bit`, without importing
bitsandbytes.

Letters: N out_features, K in_features (a multiple of 64); `...` are the dimensions of a stack of
matrices, none for a single matrix.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.quantization import GROUP_SIZE, NESTED_GROUP_SIZE, AbsmaxKind, QuantType

DEQUANTIZE_WEIGHTS = 1 << 22
"""Number of weights that `dequantize` computes at once. It needs several copies of 16 MB
(float32)."""
QUANTIZE_WEIGHTS = 1 << 20
"""Number of weights that `quantize` computes at once. It needs ten copies, and small copies are
faster on a CPU."""
MIN_ABSMAX = 1e-38
"""Minimum divisor in bitsandbytes, which keeps a group of zeros at zero."""

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""Code values of nf4, "normal float": quantiles of a normal distribution."""
FP4_TWELFTHS = (0.0, 0.0625, 8, 12, 4, 6, 2, 3, 0.0, -0.0625, -8, -12, -4, -6, -2, -3)
"""Code values of fp4 (sign, 2 bits of exponent, 1 of mantissa) in twelfths."""
# fmt: on


@dataclass(frozen=True)
class NestedAbsmax:
    """The tables that convert 8-bit absmax values to floats.

    The absmax with index i of a matrix is `code[absmax_8bit[i]] * absmax[i // 256] + offset`.
    Example: the code value 0.5, the group's scale 0.01 and the offset 0.02 give 0.025.
    """

    absmax: Tensor
    """float32 `[..., ceil(N * K / 64 / 256)]`"""
    code: Tensor
    """float32 `[256]`"""
    offset: Tensor
    """float32 `[...]`: the mean of each matrix's absmax."""


@dataclass(frozen=True)
class QuantizedTensor:
    """One matrix, or a stack of matrices, in 4 bits."""

    packed: Tensor
    """uint8 `[..., N, K / 2]`: byte j of a row has value 2j in its high nibble and value 2j + 1 in
    its low nibble."""
    absmax: Tensor
    """`[..., N, K / 64]`: float32 or bfloat16, or uint8 with `nested`."""
    code: Tensor
    """float32 `[16]`: the value of each nibble."""
    nested: NestedAbsmax | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., N, K]`"""
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes in memory, tables included."""
        tensors = [self.packed, self.absmax, self.code]
        if self.nested is not None:
            tensors += [self.nested.absmax, self.nested.code, self.nested.offset]
        return sum(tensor.nbytes for tensor in tensors)


def absmax_dtype(absmax: AbsmaxKind) -> torch.dtype:
    """Returns the dtype of an absmax tensor."""
    dtype: torch.dtype = torch.uint8 if absmax == "nested" else getattr(torch, absmax)
    return dtype


def quantize(weight: Tensor, quant_type: QuantType, absmax: AbsmaxKind) -> QuantizedTensor:
    """Quantizes floats `[..., N, K]` without NaN, on their device.

    Each matrix of a stack is quantized separately, which matters for nested absmax. Raises
    `ValueError` if K is not a multiple of 64.
    """
    in_features = weight.shape[-1]
    if in_features % GROUP_SIZE:
        raise ValueError(f"in_features ({in_features}) must be a multiple of {GROUP_SIZE}")
    code = code_values(quant_type, weight.device)
    values = weight.reshape(-1, in_features)
    packed = values.new_empty(len(values), in_features // 2, dtype=torch.uint8)
    scales = values.new_empty(len(values), in_features // GROUP_SIZE, dtype=torch.float32)
    num_rows = max(1, QUANTIZE_WEIGHTS // in_features)
    for start in range(0, len(values), num_rows):
        rows = slice(start, start + num_rows)
        packed[rows], scales[rows] = _quantize_rows(values[rows], code)
    packed = packed.view(*weight.shape[:-1], -1)
    scales = scales.view(*weight.shape[:-1], -1)
    if absmax == "nested":
        numbers, nested = quantize_absmax(scales)
        return QuantizedTensor(packed, numbers, code, nested)
    return QuantizedTensor(packed, scales.to(absmax_dtype(absmax)), code)


def dequantize(q: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns the matrices `[..., N, K]`: code value times absmax, computed in float32, rounded to
    `dtype`.

    If `out` is given, a contiguous tensor of this shape and dtype, writes to it and returns it.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype, device=q.packed.device)
    # A table with both values of each byte: one look-up instead of two, and no shifts.
    pairs = torch.stack((q.code.repeat_interleave(16), q.code.repeat(16)), dim=-1)
    pairs = pairs.view(torch.int64).flatten()  # [256]; gathering whole elements is faster
    in_features = q.shape[-1]
    packed = q.packed.view(-1, in_features // 2)
    scales = absmax_values(q.absmax, q.nested).view(-1, in_features // GROUP_SIZE)
    result = out.view(-1, in_features)
    num_rows = max(1, DEQUANTIZE_WEIGHTS // in_features)
    for start in range(0, len(result), num_rows):
        rows = slice(start, start + num_rows)
        values = pairs.index_select(0, packed[rows].flatten().int()).view(torch.float32)
        values = values.view(-1, GROUP_SIZE)
        values *= scales[rows].reshape(-1, 1)
        result[rows] = values.view(-1, in_features)
    return out


def absmax_values(absmax: Tensor, nested: NestedAbsmax | None) -> Tensor:
    """Returns `absmax` `[..., N, K / 64]` as floats."""
    if nested is None:
        return absmax
    flat = absmax.flatten(-2)
    num_groups = flat.shape[-1]
    scales = nested.absmax.repeat_interleave(NESTED_GROUP_SIZE, dim=-1)[..., :num_groups]
    values = nested.code[flat.int()] * scales + nested.offset[..., None]
    return values.view(absmax.shape)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, NestedAbsmax]:
    """Quantizes float32 `absmax` `[..., N, K / 64]` to uint8. `absmax_values` is the inverse."""
    stack = absmax.flatten(-2).view(-1, absmax.shape[-2] * absmax.shape[-1])
    offset = torch.stack([matrix.mean() for matrix in stack])
    num_groups = -(-stack.shape[1] // NESTED_GROUP_SIZE)
    padding = num_groups * NESTED_GROUP_SIZE - stack.shape[1]
    groups = F.pad(stack - offset[:, None], (0, padding)).view(len(stack), -1, NESTED_GROUP_SIZE)
    scales = groups.abs().amax(dim=-1)
    is_flat = scales == 0
    scaled = (groups * (1.0 / scales.masked_fill(is_flat, 1))[..., None]).clamp_(-1, 1)
    # bitsandbytes rounds the value to 16 bits before it looks up the nearest level.
    snapped = ((scaled + 1) * 0.5 * 65535 + 0.5).int().float() * 2 / 65535 - 1
    levels = dynamic_map(absmax.device)
    nearest = torch.bucketize(snapped, (levels[:-1] + levels[1:]) / 2, out_int32=True)
    nearest = nearest.masked_fill_(is_flat[..., None], 0).to(torch.uint8)
    offset = offset.view(absmax.shape[:-2])
    nested = NestedAbsmax(scales.view(*absmax.shape[:-2], -1), levels, offset)
    return nearest.view(len(stack), -1)[:, : stack.shape[1]].reshape(absmax.shape), nested


def code_values(quant_type: QuantType, device: torch.device | None = None) -> Tensor:
    """Returns the 16 code values: float32 `[16]`."""
    if quant_type == "nf4":
        return torch.tensor(NF4, device=device)
    return torch.tensor(FP4_TWELFTHS, device=device) / 12


def dynamic_map(device: torch.device | None = None) -> Tensor:
    """Returns the 256 values of 8-bit absmax, float32, ascending (dynamic tree, arXiv 1511.04561).

    These are 0, 1, and for each power of ten from 1e-6 to 1 evenly spaced fractions of both signs:
    1 fraction for 1e-6, 2 for 1e-5, and so on, up to 64 for 1. The fractions are the middles of
    equal parts of [0.1, 1]: 0.55e-6; 0.325e-5 and 0.775e-5; and so on.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10 ** (exponent - 6) * middles).tolist()
        values += (-(10 ** (exponent - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _quantize_rows(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Returns packed `[n, K / 2]` and absmax `[n, K / 64]` of `values` `[n, K]`."""
    groups = values.float().view(-1, GROUP_SIZE)
    absmax = groups.abs().amax(dim=-1)
    # Multiplies by the reciprocal instead of dividing, for the same rounding as in bitsandbytes.
    scaled = (groups * (1.0 / absmax.clamp(min=MIN_ABSMAX))[:, None]).clamp_(-1, 1)
    ascending, order = code.sort(stable=True)
    nearest = torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    nibbles = order.to(torch.uint8)[nearest].view(len(values), -1, 2)
    return nibbles[..., 0] << 4 | nibbles[..., 1], absmax.view(len(values), -1)
