"""The layers of a decode step as CUDA kernels, eight launches each.

The launches are norm, qkv, rotary embedding, attention, o, norm with router, gate_up, and down. On
compute capability 9.0 and newer, each kernel may start while the previous one runs, and loads
weights meanwhile; intrinsics.cuh has the rule for this.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from serve_app.model.kernels.cuda.layer_products import empty_output
from serve_app.model.kernels.cuda.step_kernels import MAX_ROWS, AttentionMemory, Routing
from serve_app.model.kernels.cuda.use_kernels import tiled
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral


class CudaStep:
    """The layers of one model with one KV cache, for at most `max_rows` rows of a batch."""

    def __init__(self, model: "Mixtral", cache: KVCache, max_rows: int) -> None:
        """Raises `StepUnavailable` with the reason if the kernels cannot compute the model."""
        if (reason := model_problem(model, max_rows)) is not None:
            raise StepUnavailable(reason)
        assert model.products is not None
        assert model.products.step_kernels is not None
        self._model, self._cache = model, cache
        self._products, self._kernels = model.products, model.products.step_kernels
        device = model.embedding.device
        self._memory = AttentionMemory(model.config, max_rows, device)
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)

    def hidden(self, batch: DecodeBatch) -> Tensor:
        """Returns the normalized hidden state after all layers, bfloat16 `[B, H]`.

        Writes the new tokens' keys and values to the cache.
        """
        model, kernels = self._model, self._kernels
        rows, size = len(batch.token_ids), model.config.hidden_size
        x = model.embedding.new_empty(rows, size)
        y, parts = torch.empty_like(x), None
        for i, layer in enumerate(model.layers):
            norm: Any = layer.input_layernorm
            if parts is None:
                kernels.embed(batch.token_ids, model.embedding, norm.weight, x, y)
            else:
                kernels.add_norm(x, parts, batch.context_lens, norm.weight, y)
            parts = self._layer(layer, i, batch, x, y)
        assert parts is not None, "a model has layers"
        kernels.add_norm(x, parts, batch.context_lens, model.norm.weight, y)
        return y

    def _layer(self, layer: Any, i: int, batch: DecodeBatch, x: Tensor, y: Tensor) -> Tensor:
        """Computes layer `i` from the hidden state `x` and its norm `y`.

        Returns the experts' outputs, float32 `[B * k, H]`, which the caller adds to `x`. Adds the
        attention's output to `x`, and overwrites `y`.
        """
        kernels, products, config = self._kernels, self._products, self._model.config
        keys, values = self._cache.keys[i], self._cache.values[i]
        qkv_weight, o_weight = tiled(layer.attention.qkv.weight), tiled(layer.attention.o.weight)
        qkv = empty_output(len(y), qkv_weight, y)
        products.dense(qkv_weight, y, qkv)
        queries = y.new_empty(len(y), config.num_attention_heads, config.head_dim)
        rope = self._model.rope
        kernels.rope(qkv, batch, (rope.cos, rope.sin), queries, keys, values)
        attended = torch.empty_like(queries).flatten(1)
        kernels.attention(queries, keys, values, batch, self._memory, attended)
        projected = empty_output(len(y), o_weight, y)
        products.dense(o_weight, attended, projected)
        routing = Routing.empty(len(y), config, self._finished)
        norm = layer.post_attention_layernorm.weight
        kernels.add_norm_route(x, projected, batch.context_lens, norm, layer.mlp.router, y, routing)
        gate_up, down = tiled(layer.mlp.experts.gate_up), tiled(layer.mlp.experts.down)
        order, starts, weights = routing.order, routing.starts, routing.topk_weights
        return products.experts(gate_up, down, y, order, starts, weights)


def model_problem(model: "Mixtral", max_rows: int) -> str | None:
    """Returns the reason why CUDA kernels cannot compute the layers, or None if they can."""
    if model.embedding.dtype != torch.bfloat16:
        return f"the model computes in {str(model.embedding.dtype)[6:]}, the kernels in bfloat16"
    if max_rows > MAX_ROWS:
        return f"a step may have {max_rows} rows, but the kernels accept {MAX_ROWS}"
    if model.products is None:
        return "the 4-bit products do not use CUDA kernels"
    return None if model.products.step_kernels else model.products.step_problem
