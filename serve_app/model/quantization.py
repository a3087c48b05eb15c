"""Constants and types of 4-bit weights, shared by files, memory and kernels. Imports no torch.

The weights of a row are divided into quantization groups of 64. Each weight is one of 16 code
values (stored as a nibble) times `absmax`, the largest absolute value of its group (QLoRA, arXiv
2305.14314). absmax itself is stored in one of three ways, see `AbsmaxKind`.
"""

from dataclasses import dataclass, replace
from typing import Literal

QuantType = Literal["nf4", "fp4"]
"""The type of the 16 code values: nf4 are quantiles of a normal distribution, fp4 are 4-bit
floats."""
AbsmaxKind = Literal["float32", "bfloat16", "nested"]
"""absmax is stored as float32, rounded to bfloat16, or quantized to 8 bits ("nested", "double
quantization"). In memory it is always bfloat16."""

GROUP_SIZE = 64
"""Number of weights in a quantization group. They are adjacent in one row and share one absmax."""
NESTED_GROUP_SIZE = 256
"""Number of 8-bit absmax values that share one float32 scale."""
NUM_CODES, NUM_NESTED_CODES = 16, 256
"""Number of values of a nibble, and of an 8-bit absmax."""
ABSMAX_DTYPES: dict[AbsmaxKind, str] = {"float32": "F32", "bfloat16": "BF16", "nested": "U8"}
"""dtype of an absmax tensor, by safetensors' names."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """The storage of all quantized weights of a checkpoint or of a model."""

    quant_type: QuantType
    absmax: AbsmaxKind

    @property
    def in_memory(self) -> "Quantization":
        """The storage of the same weights in memory, where every absmax is bfloat16.

        For Mixtral 8x7B this takes 0.7 GB more than nested absmax and 1.5 GB less than float32.
        """
        return replace(self, absmax="bfloat16")


def num_nested_groups(num_weights: int) -> int:
    """Returns the number of float32 scales of the nested absmax of a matrix with `num_weights`
    weights.

    Example: a matrix [1024, 4096] has 4,194,304 / 64 = 65,536 absmax values and 65,536 / 256 = 256
    scales.
    """
    return -(-num_weights // GROUP_SIZE // NESTED_GROUP_SIZE)
