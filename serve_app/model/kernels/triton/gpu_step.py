"""GpuStep: the decode step of a Mixtral on a GPU, by Triton or CUDA kernels.

It never waits for the device, so it can be captured as a CUDA graph. Its logits equal those of
`model/mixtral.py` up to rounding in the model's dtype. Before it is used, it is compared with plain
torch on the device (`step_trial.py`). The layers are computed in the first of these ways that is
possible and agrees:

1. by CUDA kernels (`cuda/cuda_step.py`)
2. by CUDA kernels for the 4-bit products, and Triton kernels for everything else
3. by Triton kernels, with ten launches per layer; torch multiplies float weights

The Triton kernels have run on an H200 (torch 2.11, Triton 3.6) and agreed with plain torch. A step
of Mixtral 8x7B with one sequence took 8.5 ms.
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.kernels.cuda.cuda_step import CudaStep
from serve_app.model.kernels.cuda.layer_products import TileUnpacker, empty_output
from serve_app.model.kernels.cuda.use_kernels import tiled, tiling_problem
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.kernels.triton import step_trial
from serve_app.model.kernels.triton.nf4_decode import Packed
from serve_app.model.kernels.triton.nf4_unpack import Unpacker
from serve_app.model.kernels.triton.paged_attention import PagedAttention
from serve_app.model.kernels.triton.step_kernels import add_norm, rope_write
from serve_app.model.kernels.triton.step_products import dense, products_of
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache
from serve_app.model.linear import QuantizedLinear

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)

UNPACK_TOLERANCE = 1e-2
"""Maximum relative error of weights that a kernel has dequantized."""


class GpuStep:
    """The step of one model with one KV cache, for at most `max_rows` rows of a batch."""

    def __init__(
        self, model: "Mixtral", cache: KVCache, max_rows: int, *, in_cuda: bool = False
    ) -> None:
        """With `in_cuda`, CUDA kernels compute all layers. Raises `StepUnavailable` if they
        cannot."""
        self._model, self._cache = model, cache
        config, dtype = model.config, model.embedding.dtype
        self._lm_head = model.lm_head
        self._cuda_step = CudaStep(model, cache, max_rows) if in_cuda else None
        if in_cuda:
            self.note = "decode steps run in CUDA kernels"
            return
        self._products = [products_of(model, layer, dtype) for layer in model.layers]
        self.note = "decode steps run in Triton kernels"
        """A note for `/health` about the kernels of the decode step."""
        if model.products is not None:
            self.note += ", their 4-bit products in CUDA kernels"
        self._attention = PagedAttention(
            config.num_attention_heads, cache.keys[0], config.sliding_window, max_rows
        )
        if isinstance(model.lm_head, QuantizedLinear) and model.products is None:
            self._packed_lm_head = Packed.from_weight(model.lm_head.weight, dtype)

    @classmethod
    def verified(cls, model: "Mixtral", cache: KVCache, max_rows: int) -> "GpuStep":
        """Returns the step of `model` in the first way that agrees with plain torch.

        `cache` must be unused. Raises `StepUnavailable` if no way agrees, and
        `torch.OutOfMemoryError`.
        """
        without_cuda = ""
        if model.products is not None:
            try:
                return cls._compared(model, cache, max_rows, in_cuda=True)
            except StepUnavailable as reason:
                without_cuda = f", because not all can be in CUDA: {reason}"
        try:
            step = cls._compared(model, cache, max_rows)
            step.note += without_cuda
            return step
        except StepUnavailable as reason:
            if model.products is None:
                raise
            model.products = None
            step = cls._compared(model, cache, max_rows)
            step.note += f": with CUDA kernels for 4-bit products {reason}"
            return step

    @classmethod
    def _compared(
        cls, model: "Mixtral", cache: KVCache, max_rows: int, *, in_cuda: bool = False
    ) -> "GpuStep":
        _require_fitting(model)
        batches = step_trial.contexts(model.config, cache)
        step = cls(model, cache, max(max_rows, *map(len, batches)), in_cuda=in_cuda)
        try:
            errors = [step_trial.error(model, cache, step.logits, lengths) for lengths in batches]
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a compiler or driver may raise any exception
            log.exception("the compiled step failed in its trial")
            reason = f"it failed in its trial ({type(failure).__name__}: {str(failure)[:200]})"
            raise StepUnavailable(reason) from None
        tolerance = step_trial.TOLERANCE[model.embedding.dtype]
        wrong = [error for error in errors if not error < tolerance]  # also true for NaN
        if wrong:
            raise StepUnavailable(f"it differs from plain torch by {wrong[0]:.1e}")
        return step

    @torch.inference_mode()
    def unpack_for_prompts(self) -> list[str]:
        """Makes the model dequantize weights for prompts by a kernel, if the kernel agrees with
        plain torch. Returns a note for `/health`; none for float weights."""
        codebook, dtype = self._model.codebook, self._model.embedding.dtype
        if codebook is None:
            return []
        layer: Any = self._model.layers[0]
        down = layer.mlp.experts.down
        first = torch.zeros(1, dtype=torch.int64, device=down.packed.device)
        expected, unpack = down.floats(first, dtype), self._unpacker()
        actual = unpack(down, first)
        error = float(_norm(actual.sub_(expected)) / _norm(expected))
        if not error < UNPACK_TOLERANCE:
            return [f"prompts unpack weights in plain torch: the kernel differs by {error:.1e}"]
        codebook.unpack = unpack
        return ["prompts unpack weights by a kernel"]

    def _unpacker(self) -> "Unpacker | TileUnpacker":
        products = self._model.products
        if products is not None:
            return TileUnpacker(products)
        return Unpacker(self._model.embedding.dtype)

    @torch.inference_mode()
    def logits(self, batch: DecodeBatch) -> Tensor:
        """Returns float32 logits `[B, vocab_size]`, and writes the new tokens' keys and values."""
        if self._cuda_step is not None:
            return self._logits_of(self._cuda_step.hidden(batch))
        model, config = self._model, self._model.config
        x = F.embedding(batch.token_ids, model.embedding)
        where = (batch.positions, batch.slots, batch.context_lens)
        queries = x.new_empty(len(x), config.num_attention_heads, config.head_dim)
        attended, parts = torch.empty_like(queries).flatten(1), None
        # During the trial, `model.layers` has fewer layers than `_products`.
        for i, (layer, products) in enumerate(zip(model.layers, self._products, strict=False)):
            keys, values = self._cache.keys[i], self._cache.values[i]
            qkv = products.qkv(normed(x, parts, batch, layer.input_layernorm))
            rope_write(qkv, where, model.rope.cos, model.rope.sin, queries, keys, values)
            context = (keys, values, batch.tables, batch.context_lens)
            self._attention(queries, *context, attended)
            y = normed(x, products.o(attended), batch, layer.post_attention_layernorm)
            parts = products.mlp(y, batch.context_lens)
        return self._logits_of(normed(x, parts, batch, model.norm))

    def _logits_of(self, y: Tensor) -> Tensor:
        """Returns the logits of the normalized hidden state `y`."""
        head, products = self._lm_head, self._model.products
        if not isinstance(head, QuantizedLinear):
            weight = self._model.embedding if head is None else head.weight
            return F.linear(y, weight).float()
        if products is None:
            return dense(self._packed_lm_head, y).sum(0)
        tiles = tiled(head.weight)
        logits = empty_output(len(y), tiles, y)
        products.dense(tiles, y, logits)
        return logits

    def decode(self, batch: Batch) -> Tensor:
        """The same as `logits` for a `Batch` in which every sequence decodes."""
        inputs = (batch.token_ids, batch.positions, batch.slots)
        device = batch.token_ids.device
        lens = torch.tensor(batch.context_lens, dtype=torch.int32)
        if device.type != "cpu":  # a copy from other memory may wait for the device
            lens = lens.pin_memory()
        lens = lens.to(device, non_blocking=True)
        return self.logits(DecodeBatch(*inputs, lens, batch.block_tables.int()))


def normed(x: Tensor, parts: Tensor | None, batch: DecodeBatch, norm: Any) -> Tensor:
    """Adds `parts` to `x` and returns `x` normalized by `norm`."""
    return add_norm(x, parts, batch.context_lens, norm.weight, norm.eps)


def _norm(x: Tensor) -> Tensor:
    """Returns the norm of `x`, summed in float32 without a copy of `x` in float32."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
    return norm


def _require_fitting(model: "Mixtral") -> None:
    head_dim, embedding = model.config.head_dim, model.embedding
    if model.float_modules:
        raise StepUnavailable("some layers have experts or attention in floats beside 4 bits")
    if (outside := tiling_problem(model)) is not None:
        raise StepUnavailable(outside)
    if head_dim & (head_dim - 1) or head_dim < 16:
        raise StepUnavailable("head_dim must be a power of two, and at least 16")
    if model.codebook is not None and embedding.is_cuda and embedding.dtype == torch.float32:
        raise StepUnavailable("4-bit weights are decoded to 16-bit floats only")
