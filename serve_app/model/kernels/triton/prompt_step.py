"""PromptStep: a step with prompt tokens on a GPU, by kernels, without waiting for the device.

Its logits equal those of `model/mixtral.py` up to rounding in the model's dtype. Before it is used,
it is compared with plain torch on the device, and so is each form of its products
(`prompt_products.py`). It shares the kernels for norms, the rotary embedding and the KV cache with
the decode step. One launch computes the attention of all chunks (`prompt_attention.py`).
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.batch import Batch
from serve_app.model.kernels.cuda.launcher import DriverError
from serve_app.model.kernels.cuda.prompt_passes import PassedProducts, max_tokens, speed_of
from serve_app.model.kernels.triton.prompt_attention import PromptAttention
from serve_app.model.kernels.triton.prompt_products import (
    PromptProducts,
    TorchProducts,
    UnpackedProducts,
)
from serve_app.model.kernels.triton.step_kernels import add_norm, rope_write
from serve_app.model.kernels.triton.step_trial import TOLERANCE
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.kv import KVCache

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

log = logging.getLogger(__name__)

TRIAL_CHUNKS = ((130, 150), (33, 70), (5, 5), (1, 1), (1, 20), (40, 1100))
"""The chunks of the trial: number of new tokens, and of all tokens. Chunks that do not fit into the
cache or the context are left out. Attention cuts the context of the last chunk into splits, which a
second kernel combines."""
TRIAL_LAYERS = 2
"""See `step_trial.TRIAL_LAYERS`."""


class PromptStep:
    """The step of one model with one KV cache."""

    def __init__(self, model: "Mixtral", cache: KVCache) -> None:
        self._model, self._cache = model, cache
        config = model.config
        self._attention = PromptAttention(
            config.num_attention_heads, cache.keys[0], config.sliding_window
        )
        self._products: PromptProducts = TorchProducts(model)
        self._few: PromptProducts | None = None
        self.few_tokens = 0
        """Steps with up to this many tokens use the decode step's products (`_few`)."""
        self.note = "attention in kernels, products in torch"
        """A phrase for `/health` about attention, routing and products."""

    @classmethod
    def verified(cls, model: "Mixtral", cache: KVCache, experts_at_once: int) -> "PromptStep":
        """Returns the step of `model` after comparing it with plain torch.

        `cache` must be unused. `experts_at_once`: see `UnpackedProducts`. Raises `StepUnavailable`
        if the step fails or differs.
        """
        step = cls(model, cache)
        step._require_agreement(step._products)
        if model.codebook is not None:
            step._choose_products(model, experts_at_once)
        return step

    def _choose_products(self, model: "Mixtral", experts_at_once: int) -> None:
        """Sets the fastest forms of the products that agree with plain torch."""
        try:
            unpacked = UnpackedProducts(model, experts_at_once)
            self._require_agreement(unpacked)
            self._products = unpacked
            self.note = (
                "attention, routing and products in kernels, with the weights of "
                f"{experts_at_once} experts as floats at a time"
            )
        except StepUnavailable as reason:
            self.note += f": {reason}"
        if model.products is None:
            return
        try:
            few = PassedProducts(model, model.products)
            self._require_agreement(few)
        except StepUnavailable as reason:
            self.note += f"; none by the decode step's products: {reason}"
            return
        self._few, self.few_tokens = few, self._crossover(model.products.pass_tokens)
        self.note += f"; up to {self.few_tokens} tokens by the decode step's products, as computed"

    def _crossover(self, pass_tokens: int) -> int:
        """Returns the number of tokens up to which the decode step's products are used.

        They compute `pass_tokens` tokens of an expert at once.
        """
        device = self._model.embedding.device
        if device.type != "cuda":
            return pass_tokens
        try:
            return max_tokens(self._model.config, speed_of(device), pass_tokens)
        except DriverError:
            log.exception("the GPU's clocks are not known")
            return pass_tokens

    def _require_agreement(self, products: PromptProducts) -> None:
        """Raises `StepUnavailable` if the step with `products` fails or its logits differ."""
        try:
            error = self._error(products)
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a compiler or driver may raise any exception
            log.exception("the step of prompts failed in its trial")
            reason = f"the kernels failed in their trial ({type(failure).__name__}: "
            raise StepUnavailable(f"{reason}{str(failure)[:200]})") from None
        if not error < TOLERANCE[self._model.embedding.dtype]:  # also true for NaN
            raise StepUnavailable(f"the kernels differ from plain torch by {error:.1e}")

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Returns float32 logits `[sampled, vocab_size]` of `batch.sample_rows`, and writes the new
        tokens' keys and values to the cache."""
        if self._few is not None and len(batch.token_ids) <= self.few_tokens:
            return self._logits(batch, self._few)
        return self._logits(batch, self._products)

    def _logits(self, batch: Batch, products: PromptProducts) -> Tensor:
        model, config = self._model, self._model.config
        x = F.embedding(batch.token_ids, model.embedding)
        is_live = torch.ones(len(x), dtype=torch.int32, device=x.device)
        rows, tiles = (batch.positions, batch.slots, is_live), self._attention.plan(batch)
        queries = x.new_empty(len(x), config.num_attention_heads, config.head_dim)
        attended, parts = torch.empty_like(queries).flatten(1), None
        products.begin()
        layer: Any
        for i, layer in enumerate(model.layers):
            keys, values = self._cache.keys[i], self._cache.values[i]
            y = normed(x, parts, is_live, layer.input_layernorm)
            rope_write(
                *(products.qkv(i, y), rows, model.rope.cos, model.rope.sin),
                *(queries, keys, values),
            )
            self._attention(queries, keys, values, tiles, attended)
            o = products.o(i, attended)
            y = normed(x, o, is_live, layer.post_attention_layernorm)
            parts = products.mlp(i, y)
        y = normed(x, parts, is_live, model.norm)[batch.sample_rows]
        logits: Tensor = F.linear(y, model.embedding) if model.lm_head is None else model.lm_head(y)
        return logits.float()

    @torch.inference_mode()
    def _error(self, products: PromptProducts) -> float:
        """Returns the median relative error of all tokens' logits after the first layers.

        The keys and values of cached tokens are random. The result is NaN if a logit is not finite.
        """
        model, cache = self._model, self._cache
        batch = trial_batch(cache, model.config.max_position_embeddings, model.config.vocab_size)
        blocks = torch.unique(batch.block_tables)
        for tensor in (*cache.keys, *cache.values):
            tensor[blocks] = torch.randn_like(tensor[blocks])
        layers = model.layers
        try:
            model.layers = layers[:TRIAL_LAYERS]
            expected, actual = model(batch, cache), self._logits(batch, products)
        finally:
            model.layers = layers
        cache.clear(blocks)
        errors = (actual - expected).norm(dim=1) / expected.norm(dim=1)
        return float(errors.median()) if errors.isfinite().all() else float("nan")


def normed(x: Tensor, parts: Tensor | None, is_live: Tensor, norm: Any) -> Tensor:
    """Adds `parts` `[S, T * C, H]` to `x` `[T, H]` and returns `x` normalized by `norm`."""
    return add_norm(x, parts, is_live, norm.weight, norm.eps)


def trial_batch(cache: KVCache, longest: int, vocab_size: int) -> Batch:
    """Returns the chunks of `TRIAL_CHUNKS` that fit into `cache` and into contexts of `longest`
    tokens."""
    size = cache.block_size
    chunks: list[tuple[int, int]] = []
    tables: list[list[int]] = []
    num_blocks = 0
    for num_new, length in TRIAL_CHUNKS:
        needed = -(-length // size)
        if length <= longest and num_blocks + needed <= cache.num_blocks:
            chunks.append((num_new, length))
            tables.append(list(range(num_blocks, num_blocks + needed))[::-1])
            num_blocks += needed
    positions, slots = [], []
    for (num_new, length), table in zip(chunks, tables, strict=True):
        for position in range(length - num_new, length):
            positions.append(position)
            slots.append(table[position // size] * size + position % size)
    width = max(map(len, tables))
    numbers = torch.tensor([positions, slots], device=cache.keys[0].device)
    rows = torch.arange(len(positions), device=numbers.device)
    padded = [table + table[:1] * (width - len(table)) for table in tables]
    return Batch(
        token_ids=rows * 7 % vocab_size,
        positions=numbers[0],
        slots=numbers[1],
        query_lens=[num_new for num_new, _ in chunks],
        context_lens=[length for _, length in chunks],
        block_tables=torch.tensor(padded, device=numbers.device),
        sample_rows=rows,
    )
