"""The rows of a decode step as tensors alone: what a captured step reads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class DecodeBatch:
    """One new token for each of B sequences, or for nobody where the context length is 0."""

    token_ids: Tensor
    """int64 `[B]`, as `positions` and `slots`, which mean what they mean in `Batch`."""
    positions: Tensor
    slots: Tensor
    context_lens: Tensor
    """int32 `[B]`"""
    tables: Tensor
    """int32 `[B, max_blocks]`"""
