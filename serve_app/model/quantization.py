"""How weights are stored in 4 bits: the facts that files, memory and kernels share.

The weights of a row are divided into quantization groups of 64. Each weight is one of 16 code
values, a nibble, times `absmax`, the largest absolute value of its group (QLoRA, arXiv 2305.14314).
absmax itself is stored in one of three ways, see `AbsmaxKind`. Imports no torch.
"""

from dataclasses import dataclass, replace
from typing import Literal

QuantType = Literal["nf4", "fp4"]
"""The 16 code values: quantiles of a normal distribution, or 4-bit floats."""
AbsmaxKind = Literal["float32", "bfloat16", "nested"]
"""absmax as float32, rounded to bfloat16, or quantized to 8 bits ("double quantization"). Memory
has bfloat16 alone; the others are in files."""

GROUP_SIZE = 64
"""Weights of a quantization group: they lie side by side in one row and share one absmax."""
NESTED_GROUP_SIZE = 256
"""absmax values in 8 bits that share one float32 scale."""
NUM_CODES, NUM_NESTED_CODES = 16, 256
"""Values that a nibble, and that an absmax in 8 bits, can have."""
ABSMAX_DTYPES: dict[AbsmaxKind, str] = {"float32": "F32", "bfloat16": "BF16", "nested": "U8"}
"""dtype of an absmax tensor, by safetensors' names."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How all quantized weights of a checkpoint, or of a model, are stored."""

    quant_type: QuantType
    absmax: AbsmaxKind

    @property
    def in_memory(self) -> "Quantization":
        """How weights stored like this are held in memory: every absmax becomes bfloat16.

        For Mixtral 8x7B that takes 0.7 GB more than nested absmax and 1.5 GB less than float32.
        """
        return replace(self, absmax="bfloat16")


def num_nested_groups(num_weights: int) -> int:
    """float32 scales that the absmax of a matrix of `num_weights` takes where it is nested.

    A matrix [1024, 4096] has 4,194,304 / 64 = 65,536 absmax values and 65,536 / 256 = 256 scales.
    """
    return -(-num_weights // GROUP_SIZE // NESTED_GROUP_SIZE)
