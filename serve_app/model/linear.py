"""Linear layers without bias: the weight as floats, or in 4 bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.quantized_weight import Codebook, QuantizedWeight


class Linear(nn.Module):
    """`x @ weight.T`, with a weight `[sum(out_features), in_features]` of floats.

    The weight is one matrix, or several with the same input, one above the other: q, k and v.
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...]) -> None:
        super().__init__()
        weight = torch.empty(sum(out_features), in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QuantizedLinear(nn.Module):
    """`Linear` with a weight in 4 bits, which every product dequantizes anew."""

    def __init__(self, codebook: Codebook, in_features: int, out_features: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = QuantizedWeight(codebook, (), in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.floats((), x.dtype))


def linear(
    in_features: int, out_features: tuple[int, ...], codebook: Codebook | None
) -> Linear | QuantizedLinear:
    """Returns a linear layer; in 4 bits with a `codebook`."""
    if codebook is None:
        return Linear(in_features, out_features)
    return QuantizedLinear(codebook, in_features, out_features)
