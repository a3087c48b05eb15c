"""The kernels of a decode step besides its products: norms, router, rotary embedding, attention.

Each method is one launch. Tensors without a stated dtype are bfloat16. Padding rows have context
length 0. Letters: B rows, H hidden_size, E experts, k experts per token, D head_dim, P positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.footprint import MAX_SPLITS
from serve_app.model.kernels.cuda.launchable import Launchable, MakeKernel
from serve_app.model.kernels.cuda.launcher import Grid
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.decode_batch import DecodeBatch

MAX_ROWS = 4096
"""Maximum number of rows of a step, because one block sorts their experts in its shared memory."""
NUM_PROGRAMS, MIN_PROGRAMS = 384, 4
"""Approximate number of blocks of an attention launch, and minimum number of blocks of one row and
KV head. Its n blocks compute every nth split each. On an H200, 8 rows with contexts of 512 take
10.2 us, and 13.3 us with 2,048 blocks; 128 rows with 2,048 take 350 us, and 367 us with 2 blocks
each."""
MAX_HIDDEN, MAX_EXPERTS, MAX_GROUP, HEAD_DIMS = 8192, 8, 8, (64, 128)
"""Limits of the CUDA sources. A group is the query heads that share a KV head."""
ATTENTION_WARPS, ROPE_THREADS = 4, 256
"""Warps of a block of attention.cu, and threads of a block of rope.cu, as in these sources."""


@dataclass(frozen=True)
class Routing:
    """The experts of each row, in the form that `CudaProducts` reads.

    Example: rows 0 and 1 use experts [2, 0] and [0, 1] of 3. The entries row * 2 + j, sorted by
    expert, are `order` [1, 2, 3, 0], and `starts` is [0, 2, 3, 4].
    """

    topk_ids: Tensor
    """int32 `[B * k]`; E for padding rows."""
    topk_weights: Tensor
    """float32 `[B * k]`"""
    order: Tensor
    """int32 `[B * k]`: the entries row * k + j sorted by expert. Padding rows have no entries, so
    the end of the tensor is unset."""
    starts: Tensor
    """int32 `[E + 1]`: the first index of each expert's entries in `order`, and their number."""
    finished: Tensor
    """int32 `[1]`: counts the finished blocks of a launch, which leaves it at 0. All launches use
    the same tensor."""

    @classmethod
    def empty(cls, rows: int, config: MixtralConfig, finished: Tensor) -> "Routing":
        """Returns uninitialized tensors for `rows` rows, with the given `finished`."""
        entries, experts = rows * config.num_experts_per_tok, config.num_local_experts
        ids, order = finished.new_empty(2, entries)
        weights = torch.empty(entries, dtype=torch.float32, device=finished.device)
        return cls(ids, weights, order, finished.new_empty(experts + 1), finished)


class AttentionMemory:
    """Memory for the results of the splits of one attention launch, for at most `max_rows` rows."""

    def __init__(self, config: MixtralConfig, max_rows: int, device: torch.device) -> None:
        heads = (max_rows, config.num_attention_heads, MAX_SPLITS)
        self.sums = torch.empty(*heads, config.head_dim, device=device)
        self.stats = torch.empty(*heads, 2, device=device)
        kv_heads = config.num_key_value_heads
        self.finished = torch.zeros(max_rows, kv_heads, dtype=torch.int32, device=device)


class StepKernels:
    """The kernels of one model on one card."""

    def __init__(self, config: MixtralConfig, card: Card, make: MakeKernel) -> None:
        self._config = config
        size, overlaps = config.hidden_size, card.overlaps_kernels
        experts, top_k = config.num_local_experts, config.num_experts_per_tok
        warps = size // 256

        def norm(summands: int, experts: int) -> Launchable:
            shared = 4 * warps * (1 + experts)
            shared += 4 * (experts + 1) + MAX_ROWS * top_k if experts else 0
            macros = (
                *(f"SIZE={size}", f"SUMMANDS={summands}", f"EXPERTS={experts}"),
                *(f"TOP_K={top_k}", f"MAX_ENTRIES={MAX_ROWS * top_k}"),
                f"EPS={config.rms_norm_eps!r}f",
            )
            return make("add_norm", macros, Grid(1, size // 8, shared, overlaps))

        self._embed, self._norm, self._norm_route = norm(0, 0), norm(top_k, 0), norm(1, experts)
        heads, kv_heads, head_dim = _heads(config)
        macros = (f"HEADS={heads}", f"KV_HEADS={kv_heads}", f"HEAD_DIM={head_dim}")
        self._rope_blocks = -(-(heads + 2 * kv_heads) * head_dim // (4 * ROPE_THREADS))
        self._rope = make("rope", macros, Grid(1, ROPE_THREADS, 0, overlaps))
        scale = head_dim**-0.5 * math.log2(math.e)
        grid = Grid(1, 32 * ATTENTION_WARPS, attention_bytes(config), overlaps)
        self._attention = make("attention", (*macros, f"SCALE={scale!r}f"), grid)

    def embed(self, ids: Tensor, embedding: Tensor, weight: Tensor, x: Tensor, y: Tensor) -> None:
        """Fills `x` `[B, H]` with the rows `ids` (int64 `[B]`) of `embedding`, and `y` with the
        RMSNorm of `x`. `weight` is the norm's, `[H]`."""
        tensors = (ids, embedding, x, None, None, weight, y)
        self._embed.launch(*tensors, *[None] * 6, blocks=len(x))

    def add_norm(self, x: Tensor, parts: Tensor, lens: Tensor, weight: Tensor, y: Tensor) -> None:
        """Adds the k rows of float32 `parts` `[B * k, H]` to each row of `x` `[B, H]`, and fills
        `y` with the RMSNorm of `x`. Adds nothing to padding rows."""
        self._norm.launch(None, None, x, parts, lens, weight, y, *[None] * 6, blocks=len(x))

    def add_norm_route(
        self,
        x: Tensor,
        parts: Tensor,
        lens: Tensor,
        weight: Tensor,
        router: Tensor,
        y: Tensor,
        out: Routing,
    ) -> None:
        """The same as `add_norm` with `parts` `[B, H]`. Then chooses the experts of each row by
        `router` `[E, H]`, and fills `out`."""
        results = (out.topk_ids, out.topk_weights, out.order, out.starts, out.finished)
        tensors = (None, None, x, parts, lens, weight, y, router)
        self._norm_route.launch(*tensors, *results, blocks=len(x))

    def rope(
        self,
        qkv: Tensor,
        batch: DecodeBatch,
        tables: tuple[Tensor, Tensor],
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Applies the rotary embedding. Reads float32 `qkv` `[B, (heads + 2 KV heads) * D]`, fills
        `queries` `[B, heads, D]`, and writes the new tokens' slots of `keys` and `values`.
        `tables` has cos and sin, `[P, D]` each."""
        rows = (batch.positions, batch.slots, batch.context_lens)
        blocks = len(qkv) * self._rope_blocks
        self._rope.launch(qkv, *rows, *tables, queries, keys, values, blocks=blocks)

    def attention(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: DecodeBatch,
        memory: AttentionMemory,
        out: Tensor,
    ) -> None:
        """Fills `out` `[B, heads * D]` with the attention of `queries` over one layer's `keys` and
        `values`, `[num_blocks, block_size, KV heads, D]`. Padding rows get zeros."""
        rows, kv_heads, block_size = len(queries), keys.shape[2], keys.shape[1]
        programs = max(MIN_PROGRAMS, min(MAX_SPLITS, NUM_PROGRAMS // (rows * kv_heads)))
        window = self._config.sliding_window or 0
        self._attention.launch(
            *(queries, keys, values, batch.tables, batch.context_lens),
            *(memory.sums, memory.stats, memory.finished, out),
            *(batch.tables.stride(0), block_size, window, programs),
            blocks=rows * kv_heads * programs,
        )


def config_problem(config: MixtralConfig) -> str | None:
    """Returns the reason why the kernels cannot compute a model, or None if they can."""
    heads, kv_heads, head_dim = _heads(config)
    if config.hidden_size % 256 or config.hidden_size > MAX_HIDDEN:
        return f"hidden_size must be a multiple of 256, up to {MAX_HIDDEN}"
    if config.num_local_experts > MAX_EXPERTS:
        return f"there are more than {MAX_EXPERTS} experts"
    if head_dim not in HEAD_DIMS or heads > MAX_GROUP * kv_heads:
        return f"head_dim must be 64 or 128, with at most {MAX_GROUP} query heads of a KV head"
    return None


def attention_bytes(config: MixtralConfig) -> int:
    """Returns the bytes of shared memory of a block of attention.cu."""
    heads, kv_heads, head_dim = _heads(config)
    sums = ATTENTION_WARPS * (heads // kv_heads) * (head_dim + 2) * 4
    return head_dim * 16 + -(-(sums + 4) // 16) * 16


def _heads(config: MixtralConfig) -> Sequence[int]:
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim
