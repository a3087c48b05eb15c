"""Batch: the tokens of several sequences that one forward pass computes, as flat tensors."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """The new tokens of all sequences, one sequence after the other.

    Every tensor is int64 and on the model's device. Example: sequence A decodes its token at
    position 5, and sequence B has a prefill chunk of 3 tokens from position 0. KV blocks hold 4
    tokens; A has blocks 7 and 2, and B has block 9:

        token_ids [a5, b0, b1, b2]      query_lens    [1, 3]
        positions [5, 0, 1, 2]          context_lens  [6, 3]
        slots     [9, 36, 37, 38]       block_tables  [[7, 2], [9, 0]]
        sample_rows  [0, 3]

    The slot of a5 is block 2 * 4 + offset 1 = 9.
    """

    token_ids: Tensor
    """`[tokens]`"""
    positions: Tensor
    """`[tokens]`: each token's position in its own sequence, from 0."""
    slots: Tensor
    """`[tokens]`: the slot of each token's key and value: KV block * block_size + offset."""
    query_lens: list[int]
    """Number of new tokens of each sequence; 1 for a decode."""
    context_lens: list[int]
    """Number of tokens of each sequence in the KV cache after this step."""
    block_tables: Tensor
    """`[sequences, max_blocks]`: each sequence's KV blocks in order, padded with 0."""
    sample_rows: Tensor
    """`[sampled]`: the rows of the flattened tokens whose logits are computed."""
