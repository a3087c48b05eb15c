"""Mixtral's forward pass: a batch of tokens in, the next tokens' logits out.

The model of "Mixtral of Experts" (arXiv 2401.04088): a Llama-like decoder whose feed-forward
network is a choice of experts. Computes what transformers' `MixtralForCausalLM` computes. In
float32 on a CPU a decoded row gets the same bits alone and in any batch: all matrix products have
their rows padded (`rows.py`), everything else works row by row.

Knows no checkpoint files, no sequences and no sampling.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.attention import AttentionPlan, attend, plan_attention
from serve_app.model.batch import Batch
from serve_app.model.config import MixtralConfig
from serve_app.model.experts import Experts
from serve_app.model.experts4 import Experts4
from serve_app.model.kv import KVCache
from serve_app.model.linear import Linear
from serve_app.model.matrices4 import Codes, Linear4
from serve_app.model.quantization import Quantization
from serve_app.model.rows import round_up, row_multiple


@dataclass
class Step:
    """What all layers need to know of one batch."""

    num_tokens: int
    """Rows of the hidden state that are tokens; the others are padding."""
    slots: Tensor
    """`[tokens]`"""
    cos: Tensor
    """`[tokens, 1, head_dim]`, as `sin`."""
    sin: Tensor
    attention: AttentionPlan


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _weight(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), pairing element i with i + head_dim / 2."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_position_embeddings, 1, config.head_dim)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)

    def fill(self) -> None:
        """Computes the tables in place, in float32 first."""
        length, head_dim = self.config.max_position_embeddings, self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / self.config.rope_theta**exponents
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        self.cos.copy_(torch.cat((cos, cos), dim=-1))
        # The sign of the rotation's minus is in the table, so that rotating is a roll.
        self.sin.copy_(torch.cat((-sin, sin), dim=-1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of `rotate` for `positions` `[tokens]`, each `[tokens, 1, head_dim]`."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[tokens, heads, head_dim]`, turned by its position."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention over the KV cache."""

    def __init__(self, config: MixtralConfig, codes: Codes | None) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv = linear(config.hidden_size, (queries, keys, keys), codes)
        self.o = linear(queries, (config.hidden_size,), codes)

    def forward(self, x: Tensor, layer: int, step: "Step", cache: KVCache) -> Tensor:
        """`x` `[rows, hidden_size]` -> the same shape; writes the new keys and values."""
        tokens = step.num_tokens
        heads = self.qkv(x)[:tokens].view(tokens, -1, self.head_dim)
        rotated = rotate(heads[:, : -self.num_kv_heads], step.cos, step.sin)
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        cache.write(layer, step.slots, keys, heads[:, -self.num_kv_heads :])
        attended = x.new_zeros(x.shape[0], self.num_heads * self.head_dim)
        attend(step.attention, layer, queries, cache, attended)
        projected: Tensor = self.o(attended)
        return projected


class SparseMLP(nn.Module):
    """Router and experts: each token goes through `top_k` experts."""

    def __init__(self, config: MixtralConfig, codes: Codes | None) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.router = _weight(config.num_experts, config.hidden_size)
        self.experts = Experts(config) if codes is None else Experts4(config, codes)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """`x` `[rows, hidden_size]` -> `[num_tokens, hidden_size]`."""
        probabilities = F.linear(x, self.router)[:num_tokens].softmax(-1, dtype=torch.float32)
        weights, expert_ids = probabilities.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        mixed: Tensor = self.experts(x[:num_tokens], expert_ids, weights.to(x.dtype))
        return mixed


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: MixtralConfig, codes: Codes | None) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.attention = Attention(config, codes)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.mlp = SparseMLP(config, codes)

    def forward(self, x: Tensor, layer: int, step: Step, cache: KVCache) -> Tensor:
        x = x + self.attention(self.attention_norm(x), layer, step, cache)
        x[: step.num_tokens] += self.mlp(self.mlp_norm(x), step.num_tokens)
        return x


class Mixtral(nn.Module):
    """The whole model. Its weights are unset until a loader fills them.

    With a `quantization`, experts and attention projections are in 4 bits, and the head where
    `quantize_lm_head` says so; routers, norms and embeddings are floats in any case.
    """

    def __init__(
        self,
        config: MixtralConfig,
        quantization: Quantization | None = None,
        quantize_lm_head: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.codes = None if quantization is None else Codes(quantization)
        self.embedding = _weight(config.vocab_size, config.hidden_size)
        self.rope = Rope(config)
        self.blocks = nn.ModuleList(Block(config, self.codes) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.head: Linear | Linear4 | None = None
        if not config.tie_embeddings:
            codes = self.codes if quantize_lm_head else None
            self.head = linear(config.hidden_size, (config.vocab_size,), codes)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Float32 logits `[sampled, vocab_size]` of `batch.sample_rows`; fills `cache`.

        An inference tensor: it can be changed in place under `torch.inference_mode()` only.
        """
        num_tokens = len(batch.token_ids)
        cos, sin = self.rope(batch.positions)
        plan = plan_attention(
            batch, cache.block_size, self.config.sliding_window, self.embedding.dtype
        )
        step = Step(num_tokens, batch.slots, cos, sin, plan)
        x = _pad_rows(F.embedding(batch.token_ids, self.embedding))
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, step, cache)
        x = _pad_rows(self.norm(x[batch.sample_rows]))
        logits: Tensor = F.linear(x, self.embedding) if self.head is None else self.head(x)
        return logits[: len(batch.sample_rows)].float()


def linear(columns: int, rows: tuple[int, ...], codes: Codes | None) -> Linear | Linear4:
    """A linear layer of `rows`, one matrix above the other; in 4 bits where there are `codes`."""
    return Linear(columns, rows) if codes is None else Linear4(codes, columns, rows)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def _pad_rows(x: Tensor) -> Tensor:
    """`x` `[n, size]` with rows of zeros below, so that each row's bits do not depend on n."""
    missing = round_up(x.shape[0], row_multiple(x)) - x.shape[0]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
