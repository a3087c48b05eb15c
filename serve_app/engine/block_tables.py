"""Which blocks each sequence of a batch has, as the model reads it.

Knows nothing of how blocks are given.
"""

import torch
from torch import Tensor

from serve_app.engine.sequence import Chunk


class BlockTables:
    """The block tables of a batch as one padded tensor.

    Most steps change nothing or add a block here and there, so the last tensor is kept.
    """

    def __init__(self) -> None:
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []
        self._tensor = torch.zeros(0, 0, dtype=torch.int64)

    def of(self, chunks: list[Chunk]) -> Tensor:
        """`[sequences, max_blocks]` on the host, rows padded with 0."""
        tables = [chunk.sequence.block_table for chunk in chunks]
        lengths = [len(table) for table in tables]
        is_same = len(tables) == len(self._tables) and all(
            table is known for table, known in zip(tables, self._tables, strict=True)
        )
        if not is_same or max(lengths) > self._tensor.shape[1]:
            # A quarter more columns than needed, so that growing is rare.
            width = max(lengths) + max(lengths) // 4 + 1
            self._tensor = torch.zeros(len(tables), width, dtype=torch.int64)
            known_lengths = [0] * len(tables)
        else:
            known_lengths = self._lengths
        for row, (table, known) in enumerate(zip(tables, known_lengths, strict=True)):
            if len(table) > known:
                self._tensor[row, known : len(table)] = torch.tensor(table[known:])
        self._tables, self._lengths = tables, lengths
        return self._tensor[:, : max(lengths)]
