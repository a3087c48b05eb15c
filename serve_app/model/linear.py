"""Linear layers without bias, with float or 4-bit weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.quantized_weight import Codebook, QuantizedWeight


class Linear(nn.Module):
    """A linear layer `x @ weight.T` with a float weight `[sum(out_features), in_features]`.

    The weight is one matrix, or several with the same input, concatenated along the rows (q, k and
    v).
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...]) -> None:
        super().__init__()
        weight = torch.empty(sum(out_features), in_features)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QuantizedLinear(nn.Module):
    """A `Linear` with a 4-bit weight, which is dequantized for every product."""

    def __init__(self, codebook: Codebook, in_features: int, out_features: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = QuantizedWeight(codebook, (), in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.floats((), x.dtype))


def linear(
    in_features: int, out_features: tuple[int, ...], codebook: Codebook | None
) -> Linear | QuantizedLinear:
    """Returns a linear layer, with a 4-bit weight if there is a `codebook`."""
    if codebook is None:
        return Linear(in_features, out_features)
    return QuantizedLinear(codebook, in_features, out_features)
