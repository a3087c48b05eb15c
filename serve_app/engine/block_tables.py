"""BlockTables: the block tables of a batch as one padded tensor for the model."""

import torch
from torch import Tensor

from serve_app.engine.scheduled_tokens import ScheduledTokens


class BlockTables:
    """Builds the padded tensor of a step's block tables.

    Between two steps most tables stay the same or grow by one block. So the last tensor is reused,
    and only new blocks are written into it.
    """

    def __init__(self) -> None:
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []
        self._tensor = torch.zeros(0, 0, dtype=torch.int64)

    def of(self, scheduled: list[ScheduledTokens]) -> Tensor:
        """Returns int64 `[sequences, max_blocks]` on the host, padded with 0.

        The tensor is valid until the next call.
        """
        tables = [part.sequence.block_table for part in scheduled]
        lengths = [len(table) for table in tables]
        is_same = len(tables) == len(self._tables) and all(
            table is last for table, last in zip(tables, self._tables, strict=True)
        )
        if not is_same or max(lengths) > self._tensor.shape[1]:
            # A quarter wider than needed, so that it is seldom allocated again.
            width = max(lengths) + max(lengths) // 4 + 1
            self._tensor = torch.zeros(len(tables), width, dtype=torch.int64)
            num_copied = [0] * len(tables)
        else:
            num_copied = self._lengths
        for row, (table, start) in enumerate(zip(tables, num_copied, strict=True)):
            if len(table) > start:
                self._tensor[row, start : len(table)] = torch.tensor(table[start:])
        self._tables, self._lengths = tables, lengths
        return self._tensor[:, : max(lengths)]
