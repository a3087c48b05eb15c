"""A matrix product with weights in the dtype of the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.nf4 import Quantized


class Linear(nn.Module):
    """`x @ weight.T`, where the weight is made of matrices one above the other (q, k and v)."""

    def __init__(self, columns: int, rows: tuple[int, ...]) -> None:
        super().__init__()
        self.rows = list(rows)
        self.weight = nn.Parameter(torch.empty(sum(rows), columns), requires_grad=False)

    def put(self, part: int, weight: Tensor | Quantized) -> None:
        """Fills the rows of one of the matrices from `weight` `[rows[part], columns]`, floats."""
        assert isinstance(weight, Tensor)
        torch.split(self.weight, self.rows)[part].copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
