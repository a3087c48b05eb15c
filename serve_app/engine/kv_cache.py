"""Which KV blocks are free: every block has one owner at most, and `free` gives it back.

Counts blocks; the keys and values themselves are tensors of `model/kv.py`. Knows no sequences.
"""


class BlockAllocator:
    """A free list over blocks 0 to `num_blocks` - 1, each holding `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The end of the list is handed out first, so that low numbers are used first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = [True] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Appends blocks until the table holds `num_tokens` tokens.

        False, and nothing is taken, when there are too few free ones.
        """
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._is_free[block] = False
            block_table.append(block)
        return True

    def free(self, block_table: list[int]) -> None:
        """Takes the blocks back. The caller drops the table."""
        for block in reversed(block_table):
            assert not self._is_free[block], f"block {block} is freed twice"
            self._is_free[block] = True
            self._free.append(block)
