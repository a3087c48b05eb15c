"""One step's tokens of several sequences, flattened: what the forward pass reads.

Plain tensors and counts. Knows no requests and no scheduling.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """The tokens of all sequences in this step, one sequence after the other.

    Every tensor is int64 and on the model's device.
    """

    token_ids: Tensor
    """`[tokens]`"""
    positions: Tensor
    """`[tokens]`: each token's position in its own sequence, from 0."""
    slots: Tensor
    """`[tokens]`: where each token's K and V go, block * block_size + offset."""
    query_lens: list[int]
    """Tokens of each sequence in this step; 1 is decode."""
    context_lens: list[int]
    """Tokens of each sequence in the KV cache after this step."""
    block_tables: Tensor
    """`[sequences, max_blocks]`: each sequence's blocks in order, rows padded with 0."""
    sample_rows: Tensor
    """`[sampled]`: the rows of the flattened tokens whose logits are wanted."""
