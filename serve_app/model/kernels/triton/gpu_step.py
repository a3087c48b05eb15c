"""The decode step of a Mixtral on a GPU, by Triton kernels, so that it can be captured as a graph.

Its logits equal those of `model/mixtral.py` to the rounding of the model's dtype; it never waits
for the device. With 4-bit weights a layer is ten launches, nearly all of our own kernels; float
weights are multiplied by torch. Where the model's products are CUDA kernels, the layers are those
of `cuda/cuda_step.py`, if they agree. Before it is used it is compared with plain torch on the
device.

It has run on an H200 (torch 2.11, Triton 3.6): every kernel was right at the first run. At batch 1
a step of Mixtral 8x7B takes 8.5 ms there.
"""

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.kernels.cuda.cuda_step import CudaStep
from serve_app.model.kernels.cuda.layer_products import LayerProducts, TileUnpacker
from serve_app.model.kernels.cuda.use_kernels import not_tiled
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.triton import nf4_decode
from serve_app.model.kernels.triton.nf4_decode import SPLIT_K, Packed
from serve_app.model.kernels.triton.nf4_unpack import Unpacker
from serve_app.model.kernels.triton.paged_attention import PagedAttention
from serve_app.model.kernels.triton.step_kernels import add_norm, rope_write, route
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.linear import QuantizedLinear

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a row's logits, compared with plain torch."""
TRIED_ROWS, TRIED_LAYERS = 20, 2
"""The trial compares logits after the first 2 layers and takes the median over 20 rows. Rounding
can flip the router's choice between two nearly equal experts, which makes single rows differ, and
through many layers nearly every row."""
UNPACK_TOLERANCE = 1e-2
"""Largest relative error of weights that a kernel has dequantized."""


class Products(Protocol):
    """The products of one layer; each returns parts `[S, B * C, N]`, to be summed over S and C."""

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
        # Padding rows get the first row's values, so that no further expert is read for them.
        x = torch.where((context_lens > 0)[:, None], x, x[:1])
        parts: Tensor = self._layer.mlp(x, len(x))[None]
        return parts


class QuantizedProducts:
    """Products with 4-bit weights, by our kernels."""

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
    """The form of a layer's products."""
    if model.codebook is None:
        return FloatProducts(layer)
    if model.products is not None:
        return LayerProducts(layer, model.products)
    return QuantizedProducts(layer, dtype)


def dense(weights: Packed, x: Tensor) -> Tensor:
    """The product as parts, float32 `[SPLIT_K, B, N]`."""
    parts = x.new_empty(SPLIT_K, len(x), weights.out_features, dtype=torch.float32)
    nf4_decode.dense(weights, x, parts)
    return parts


class GpuStep:
    """The step of one model with one KV cache, for at most `max_rows` rows of a batch."""

    def __init__(
        self, model: "Mixtral", cache: KVCache, max_rows: int, *, in_cuda: bool = False
    ) -> None:
        """`in_cuda` computes all layers with CUDA kernels; raises `StepUnavailable` where they do
        not fit."""
        self._model, self._cache = model, cache
        config, dtype = model.config, model.embedding.dtype
        self._lm_head = model.lm_head
        self._cuda_step = CudaStep(model, cache, max_rows) if in_cuda else None
        if in_cuda:
            self.note = "; its layers are CUDA kernels"
            return
        self._products = [products_of(model, layer, dtype) for layer in model.layers]
        self.note = "" if model.products is None else "; its 4-bit products are CUDA kernels"
        """How it differs from what the runner's note says about every step."""
        self._attention = PagedAttention(
            config.num_attention_heads, cache.keys[0], config.sliding_window, max_rows
        )
        if isinstance(model.lm_head, QuantizedLinear):
            self._packed_lm_head = Packed.from_weight(model.lm_head.weight, dtype)

    @classmethod
    def verified(cls, model: "Mixtral", cache: KVCache, max_rows: int) -> "GpuStep":
        """The step of `model`, compared with plain torch; `cache` must be unused.

        The first that agrees: CUDA kernels, CUDA products among Triton kernels, Triton kernels
        alone. Raises `StepUnavailable` where none does.
        """
        without_cuda = ""
        if model.products is not None:
            try:
                return cls._compared(model, cache, max_rows, in_cuda=True)
            except StepUnavailable as reason:
                without_cuda = f", its others Triton kernels: {reason}"
        try:
            step = cls._compared(model, cache, max_rows)
            step.note += without_cuda
            return step
        except StepUnavailable as reason:
            if model.products is None:
                raise
            model.products = None
            step = cls._compared(model, cache, max_rows)
            step.note = f"; its 4-bit products are Triton kernels: with the CUDA kernels {reason}"
            return step

    @classmethod
    def _compared(
        cls, model: "Mixtral", cache: KVCache, max_rows: int, *, in_cuda: bool = False
    ) -> "GpuStep":
        _require_fitting(model)
        step = cls(model, cache, max(max_rows, TRIED_ROWS), in_cuda=in_cuda)
        try:
            longest = model.config.max_position_embeddings // cache.block_size
            error = step._error(max(1, min(cache.num_blocks, TRIED_ROWS, longest)))
        except Exception as failure:  # a compiler or driver may raise anything; plain torch serves
            log.exception("the compiled step failed in its trial")
            reason = f"it failed in its trial ({type(failure).__name__}: {str(failure)[:200]})"
            raise StepUnavailable(reason) from None
        if not error < TOLERANCE[model.embedding.dtype]:  # NaN is not below it either
            raise StepUnavailable(f"it differs from plain torch by {error:.1e}")
        return step

    @torch.inference_mode()
    def unpack_for_prompts(self) -> str:
        """Lets the model dequantize weights for prompts by a kernel, if the kernel is right.

        Returns the end of the runner's note for `/health`; empty for a model in floats.
        """
        codebook, dtype = self._model.codebook, self._model.embedding.dtype
        if codebook is None:
            return ""
        layer: Any = self._model.layers[0]
        down = layer.mlp.experts.down
        first = torch.zeros(1, dtype=torch.int64, device=down.packed.device)
        expected, unpack = down.floats(first, dtype).float(), self._unpacker()
        error = float((unpack(down, first).float() - expected).norm() / expected.norm())
        if not error < UNPACK_TOLERANCE:
            return f"; prompts unpack weights in plain torch: the kernel differs by {error:.1e}"
        codebook.unpack = unpack
        return "; prompts unpack weights by a kernel"

    def _unpacker(self) -> "Unpacker | TileUnpacker":
        products = self._model.products
        if products is not None:
            return TileUnpacker(products)
        return Unpacker(self._model.embedding.dtype)

    @torch.inference_mode()
    def logits(self, batch: DecodeBatch) -> Tensor:
        """Float32 `[B, vocab_size]`; fills the cache."""
        if self._cuda_step is not None:
            return self._logits_of(self._cuda_step.hidden(batch))
        model, config = self._model, self._model.config
        x = F.embedding(batch.token_ids, model.embedding)
        where = (batch.positions, batch.slots, batch.context_lens)
        queries = x.new_empty(len(x), config.num_attention_heads, config.head_dim)
        attended, parts = torch.empty_like(queries).flatten(1), None
        # A trial runs fewer layers than there are.
        for i, (layer, products) in enumerate(zip(model.layers, self._products, strict=False)):
            keys, values = self._cache.keys[i], self._cache.values[i]
            qkv = products.qkv(normed(x, parts, batch, layer.input_layernorm))
            rope_write(qkv, where, model.rope.cos, model.rope.sin, queries, keys, values)
            context = (keys, values, batch.tables, batch.context_lens)
            self._attention(queries, *context, attended)
            y = normed(x, products.o(attended), batch, layer.post_attention_layernorm)
            parts = products.mlp(y, batch.context_lens)
        y = normed(x, parts, batch, model.norm)
        if isinstance(self._lm_head, QuantizedLinear):
            return dense(self._packed_lm_head, y).sum(0)
        return self._logits_of(y)

    def _logits_of(self, y: Tensor) -> Tensor:
        """Logits by the head in floats, from the normalized hidden state."""
        weight = self._model.embedding if self._lm_head is None else self._lm_head.weight
        return F.linear(y, weight).float()  # type: ignore[arg-type]

    def decode(self, batch: Batch) -> Tensor:
        """Float32 logits `[sequences, vocab_size]` of a batch of decodes; fills the cache."""
        inputs = (batch.token_ids, batch.positions, batch.slots)
        lens = torch.tensor(batch.context_lens, dtype=torch.int32)
        lens = lens.to(batch.token_ids.device, non_blocking=True)
        return self.logits(DecodeBatch(*inputs, lens, batch.block_tables.int()))

    @torch.inference_mode()
    def _error(self, count: int) -> float:
        """The median relative error of logits after the first layers, on random keys and values.

        NaN where a number is not finite, after all layers too. There are `count` rows with contexts
        of 1 to `count` KV blocks, which are several splits of attention; the last row is padding.
        """
        cache, size = self._cache, self._cache.block_size
        blocks = torch.arange(count, device=cache.keys[0].device)
        for stored in (*cache.keys, *cache.values):
            stored[blocks] = torch.randn_like(stored[blocks])
        # Row i attends to blocks 0 to i and writes into block i.
        lens = blocks * size + blocks % size + 1
        slots, tables = lens - 1, blocks.repeat(count, 1)
        tokens = blocks * 7 % self._model.config.vocab_size
        batch = Batch(
            token_ids=tokens,
            positions=lens - 1,
            slots=slots,
            query_lens=[1] * count,
            context_lens=lens.tolist(),
            block_tables=tables,
            sample_rows=blocks,
        )
        # The last row is padding, which must not change the others.
        context = torch.where(blocks == count - 1, 0, lens) if count > 1 else lens
        decode_batch = DecodeBatch(tokens, lens - 1, slots, context.int(), tables.int())
        is_finite = self.logits(decode_batch)[: max(1, count - 1)].isfinite().all()
        whole = self._model.layers
        try:
            self._model.layers = whole[:TRIED_LAYERS]
            expected, found = self._model(batch, cache), self.logits(decode_batch)
        finally:
            self._model.layers = whole
        cache.clear(blocks)
        errors = ((found - expected).norm(dim=1) / expected.norm(dim=1))[: max(1, count - 1)]
        is_finite &= errors.isfinite().all()
        return float(errors.median()) if is_finite else float("nan")


def normed(x: Tensor, parts: Tensor | None, batch: DecodeBatch, norm: Any) -> Tensor:
    """Adds `parts` to `x` and returns `x` normalized by `norm`."""
    return add_norm(x, parts, batch.context_lens, norm.weight, norm.eps)


def _require_fitting(model: "Mixtral") -> None:
    head_dim, embedding = model.config.head_dim, model.embedding
    if model.float_modules:
        raise StepUnavailable("some layers have experts or attention in floats beside 4 bits")
    if (outside := not_tiled(model)) is not None:
        raise StepUnavailable(outside)
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise StepUnavailable("head_dim must be a power of two, and at least 16")
    if model.codebook is not None and embedding.is_cuda and embedding.dtype == torch.float32:
        raise StepUnavailable("4-bit weights are decoded to 16-bit floats only")
