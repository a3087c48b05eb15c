"""The products of a decoder layer in the decode step of a GPU, by CUDA kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.cuda.products import CudaProducts, TiledWeight
from serve_app.model.kernels.cuda.use_kernels import tiled
from serve_app.model.kernels.triton.step_kernels import route
from serve_app.model.quantized_weight import Index, QuantizedWeight


class LayerProducts:
    """One layer's products by CUDA kernels: `Products` of `triton/step_products.py`.

    Each product returns parts `[1, n, N]`.
    """

    def __init__(self, layer: Any, products: CudaProducts) -> None:
        attention, self._mlp = layer.attention, layer.mlp
        self._products = products
        self._qkv, self._o = tiled(attention.qkv.weight), tiled(attention.o.weight)
        experts = self._mlp.experts
        self._gate_up, self._down = tiled(experts.gate_up), tiled(experts.down)

    def qkv(self, x: Tensor) -> Tensor:
        return self._dense(self._qkv, x)

    def o(self, x: Tensor) -> Tensor:
        return self._dense(self._o, x)

    def mlp(self, x: Tensor, context_lens: Tensor) -> Tensor:
        routing = route(F.linear(x, self._mlp.router), context_lens, self._mlp.top_k)
        return self._products.experts(self._gate_up, self._down, x, *routing)[None]

    def _dense(self, weight: TiledWeight, x: Tensor) -> Tensor:
        out = empty_output(len(x), weight, x)
        self._products.dense(weight, x, out)
        return out[None]


def empty_output(rows: int, weight: TiledWeight, x: Tensor) -> Tensor:
    """Returns an uninitialized float32 `[rows, N]` for a product with `weight`, on x's device."""
    return x.new_empty(rows, weight.out_features, dtype=torch.float32)


class TileUnpacker:
    """Dequantizes weights to bfloat16 for prompts."""

    def __init__(self, products: CudaProducts) -> None:
        self._products = products
        self._first: Tensor | None = None

    def __call__(self, weight: QuantizedWeight, index: Index) -> Tensor:
        """Returns a single matrix `[N, K]`, or those of a stack with the indices `index` `[n]`."""
        if isinstance(index, Tensor):
            return self._products.unpack(tiled(weight), index)
        if self._first is None:
            self._first = torch.zeros(1, dtype=torch.int64, device=weight.packed.device)
        return self._products.unpack(tiled(weight), self._first)[0]
