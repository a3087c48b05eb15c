"""DecodeBatch: the batch of a decode step, in tensors that a CUDA graph can read."""

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
    """int32 `[B]`: number of tokens in the KV cache, including the new one."""
    tables: Tensor
    """int32 `[B, max_blocks]`: each sequence's KV blocks in order."""
