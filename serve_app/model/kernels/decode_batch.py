"""The batch of a decode step as tensors alone, which is what a captured graph can read."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecodeBatch:
    """One new token for each of B rows. Padding rows have context length 0; kernels skip them."""

    token_ids: Tensor
    """int64 `[B]`"""
    positions: Tensor
    """int64 `[B]`, see `Batch.positions`."""
    slots: Tensor
    """int64 `[B]`, see `Batch.slots`."""
    context_lens: Tensor
    """int32 `[B]`: tokens in the KV cache, the new one included."""
    tables: Tensor
    """int32 `[B, max_blocks]`: each sequence's KV blocks in order."""
