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
"""absmax as float32 (in files only), rounded to bfloat16, or quantized to 8 bits ("double
quantization")."""

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
        """How weights stored like this are held on the device: float32 absmax is rounded to
        bfloat16, which changes no measured result and saves 1.5 GB for Mixtral 8x7B."""
        return replace(self, absmax="bfloat16") if self.absmax == "float32" else self

    def on_device(self, device: str, dtype: str) -> "Quantization":
        """How weights stored like this are held once the model is loaded.

        On a GPU in bfloat16, nested absmax is turned into bfloat16, which the CUDA kernels read and
        which takes 0.7 GB more for Mixtral 8x7B.
        """
        is_expanded = self.absmax == "nested" and (device, dtype) == ("cuda", "bfloat16")
        return replace(self, absmax="bfloat16") if is_expanded else self


def num_nested_groups(num_weights: int) -> int:
    """float32 scales that the absmax of a matrix of `num_weights` takes where it is nested.

    A matrix [1024, 4096] has 4,194,304 / 64 = 65,536 absmax values and 65,536 / 256 = 256 scales.
    """
    return -(-num_weights // GROUP_SIZE // NESTED_GROUP_SIZE)
