"""Mixtral's forward pass: maps the tokens of several sequences to the logits of their next tokens.

The model is that of "Mixtral of Experts" (arXiv 2401.04088): a decoder like Llama's, whose
feed-forward networks are experts. A router chooses two experts for each token. The result equals
that of transformers' `MixtralForCausalLM`.

In float32 on a CPU a token gets the same bits alone and in any batch: the rows of matrix products
are padded (`row_padding.py`), and everything else works row by row. On other devices and in other
dtypes nothing is padded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.attention import AttentionPlan, attend, plan_attention
from serve_app.model.batch import Batch
from serve_app.model.config import MixtralConfig
from serve_app.model.experts import Experts
from serve_app.model.kv import KVCache
from serve_app.model.linear import Linear, QuantizedLinear, linear
from serve_app.model.quantization import Quantization
from serve_app.model.quantized_experts import QuantizedExperts
from serve_app.model.quantized_weight import Codebook
from serve_app.model.row_padding import pad_rows

if TYPE_CHECKING:
    from serve_app.model.kernels.cuda.products import CudaProducts


@dataclass
class LayerInputs:
    """The inputs of one forward pass that all layers share."""

    num_tokens: int
    """Number of rows of the hidden state that are tokens; the rows after them are padding."""
    slots: Tensor
    """int64 `[tokens]`, see `Batch.slots`."""
    cos: Tensor
    """`[tokens, 1, head_dim]`: the cosines of the rotary embedding; `sin` has the same shape."""
    sin: Tensor
    attention: AttentionPlan


class RMSNorm(nn.Module):
    """RMS normalization over the last dimension: x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _weight(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), which rotates the pairs of elements i and i +
    head_dim / 2."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.max_position_embeddings, 1, config.head_dim)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)

    def fill(self) -> None:
        """Computes the tables in float32 and stores them in the buffers' dtype."""
        length, head_dim = self.config.max_position_embeddings, self.config.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / self.config.rope_theta**exponents
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        self.cos.copy_(torch.cat((cos, cos), dim=-1))
        # The table contains the minus sign of the rotation, so that `rotate` needs only a roll.
        self.sin.copy_(torch.cat((-sin, sin), dim=-1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cos and sin for `positions` `[tokens]`, each `[tokens, 1, head_dim]`."""
        return self.cos[positions], self.sin[positions]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies the rotary embedding to `x` `[tokens, heads, head_dim]`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention over the KV cache."""

    def __init__(self, config: MixtralConfig, codebook: Codebook | None) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        sizes = (config.q_size, config.kv_size, config.kv_size)
        self.qkv = linear(config.hidden_size, sizes, codebook)
        self.o = linear(config.q_size, (config.hidden_size,), codebook)

    def forward(self, x: Tensor, layer: int, inputs: LayerInputs, cache: KVCache) -> Tensor:
        """Maps `x` `[rows, hidden_size]` to the same shape. Writes the new keys and values to
        `cache`."""
        tokens = inputs.num_tokens
        heads = self.qkv(x)[:tokens].view(tokens, -1, self.head_dim)
        rotated = rotate(heads[:, : -self.num_kv_heads], inputs.cos, inputs.sin)
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        cache.write(layer, inputs.slots, keys, heads[:, -self.num_kv_heads :])
        attended = x.new_zeros(x.shape[0], self.num_heads * self.head_dim)
        attend(inputs.attention, layer, queries, cache, attended)
        projected: Tensor = self.o(attended)
        return projected


class SparseMLP(nn.Module):
    """The router and the experts; each token uses `num_experts_per_tok` experts."""

    def __init__(self, config: MixtralConfig, codebook: Codebook | None) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.router = _weight(config.num_local_experts, config.hidden_size)
        self.experts = Experts(config) if codebook is None else QuantizedExperts(config, codebook)

    def forward(self, x: Tensor, num_tokens: int) -> Tensor:
        """Maps `x` `[rows, hidden_size]` to `[num_tokens, hidden_size]`."""
        probabilities = F.linear(x, self.router)[:num_tokens].softmax(-1, dtype=torch.float32)
        topk_weights, topk_ids = probabilities.topk(self.top_k, dim=-1)
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
        mixed: Tensor = self.experts(x[:num_tokens], topk_ids, topk_weights.to(x.dtype))
        return mixed


class DecoderLayer(nn.Module):
    """Attention, then experts, each after a norm and with a residual connection."""

    def __init__(
        self, config: MixtralConfig, attention: Codebook | None, experts: Codebook | None
    ) -> None:
        """`attention` and `experts` are the codebooks of their weights; None means float
        weights."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, attention)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMLP(config, experts)

    def forward(self, x: Tensor, layer: int, inputs: LayerInputs, cache: KVCache) -> Tensor:
        """Maps `x` `[rows, hidden_size]` to the same shape. `layer` is the index of this layer."""
        x = x + self.attention(self.input_layernorm(x), layer, inputs, cache)
        x[: inputs.num_tokens] += self.mlp(self.post_attention_layernorm(x), inputs.num_tokens)
        return x


class Mixtral(nn.Module):
    """The whole model. `checkpoint.loader.load` fills its weights.

    With a `quantization`, experts and attention projections have 4-bit weights, except for
    `float_modules`, such as "layers.0.attention". With `quantize_lm_head`, lm_head has 4-bit
    weights too. Routers, norms and the embedding always have float weights.
    """

    def __init__(
        self,
        config: MixtralConfig,
        quantization: Quantization | None = None,
        quantize_lm_head: bool = False,
        float_modules: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.config = config
        self.codebook = None if quantization is None else Codebook(quantization.quant_type)
        self.float_modules = float_modules
        self.products: CudaProducts | None = None
        """CUDA kernels for 4-bit weights in tiles, see `use_cuda_kernels`; None if they are not
        used."""
        self.embedding = _weight(config.vocab_size, config.hidden_size)
        self.rope = Rope(config)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                self._codebook_of(f"layers.{layer}.attention"),
                self._codebook_of(f"layers.{layer}.mlp.experts"),
            )
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: Linear | QuantizedLinear | None = None
        """lm_head; None if the embedding matrix is used instead (tied embeddings)."""
        if not config.tie_word_embeddings:
            codebook = self.codebook if quantize_lm_head else None
            self.lm_head = linear(config.hidden_size, (config.vocab_size,), codebook)

    def _codebook_of(self, module: str) -> Codebook | None:
        return None if module in self.float_modules else self.codebook

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Returns float32 logits `[sampled, vocab_size]` of `batch.sample_rows`. Writes the keys
        and values of the batch to `cache`.

        The result is an inference tensor, which can only be changed in place under
        `torch.inference_mode()`.
        """
        num_tokens = len(batch.token_ids)
        cos, sin = self.rope(batch.positions)
        plan = plan_attention(
            batch, cache.block_size, self.config.sliding_window, self.embedding.dtype
        )
        inputs = LayerInputs(num_tokens, batch.slots, cos, sin, plan)
        x = pad_rows(F.embedding(batch.token_ids, self.embedding))
        for number, layer in enumerate(self.layers):
            x = layer(x, number, inputs, cache)
        x = pad_rows(self.norm(x[batch.sample_rows]))
        logits: Tensor = F.linear(x, self.embedding) if self.lm_head is None else self.lm_head(x)
        return logits[: len(batch.sample_rows)].float()


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape), requires_grad=False)
