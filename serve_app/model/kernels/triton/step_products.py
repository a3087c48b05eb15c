"""The products of a decoder layer in the decode step on a GPU.

torch multiplies by float weights, Triton kernels by 4-bit weights. `cuda/layer_products.py` has the
products by CUDA kernels.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.cuda.layer_products import LayerProducts
from serve_app.model.kernels.triton import nf4_decode
from serve_app.model.kernels.triton.nf4_decode import SPLIT_K, Packed
from serve_app.model.kernels.triton.step_kernels import route

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral


class Products(Protocol):
    """The products of one layer. Each maps B rows to parts `[S, B * C, N]`.

    The result is the sum over S and C.
    """

    def qkv(self, x: Tensor) -> Tensor: ...
    def o(self, x: Tensor) -> Tensor: ...
    def mlp(self, x: Tensor, context_lens: Tensor) -> Tensor: ...


class FloatProducts:
    """Products with float weights, by torch."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def qkv(self, x: Tensor) -> Tensor:
        parts: Tensor = self._layer.attention.qkv(x)[None]
        return parts

    def o(self, x: Tensor) -> Tensor:
        parts: Tensor = self._layer.attention.o(x)[None]
        return parts

    def mlp(self, x: Tensor, context_lens: Tensor) -> Tensor:
        # Padding rows get the first row's values, so that they use only its experts.
        x = torch.where((context_lens > 0)[:, None], x, x[:1])
        parts: Tensor = self._layer.mlp(x, len(x))[None]
        return parts


class QuantizedProducts:
    """Products with 4-bit weights, by Triton kernels."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.attention, layer.mlp
        self._qkv = Packed.from_weight(attention.qkv.weight, dtype)
        self._o = Packed.from_weight(attention.o.weight, dtype)
        self._gate_up = Packed.from_weight(mlp.experts.gate_up, dtype)
        self._down = Packed.from_weight(mlp.experts.down, dtype)
        self._router, self._top_k = mlp.router, mlp.top_k

    def qkv(self, x: Tensor) -> Tensor:
        return dense(self._qkv, x)

    def o(self, x: Tensor) -> Tensor:
        return dense(self._o, x)

    def mlp(self, x: Tensor, context_lens: Tensor) -> Tensor:
        order, starts, topk_weights = route(F.linear(x, self._router), context_lens, self._top_k)
        intermediate = x.new_empty(len(order), self._down.in_features)
        nf4_decode.gate_up(self._gate_up, x, order, starts, self._top_k, intermediate)
        parts = x.new_empty(SPLIT_K, len(order), self._down.out_features, dtype=torch.float32)
        nf4_decode.down(self._down, intermediate, order, starts, topk_weights, self._top_k, parts)
        return parts


def products_of(model: "Mixtral", layer: Any, dtype: torch.dtype) -> Products:
    """Returns the products of `layer` by the fastest means that `model` has."""
    if model.codebook is None:
        return FloatProducts(layer)
    if model.products is not None:
        return LayerProducts(layer, model.products)
    return QuantizedProducts(layer, dtype)


def dense(weights: Packed, x: Tensor) -> Tensor:
    """Returns the product as parts, float32 `[SPLIT_K, B, N]`."""
    parts = x.new_empty(SPLIT_K, len(x), weights.out_features, dtype=torch.float32)
    nf4_decode.dense(weights, x, parts)
    return parts
