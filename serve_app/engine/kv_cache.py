"""Who owns which KV block, and which blocks hold a prefix that others may share.

A block that is full and computed can be kept under a hash of its tokens and of all tokens before
them. A sequence that begins with the same tokens shares it instead of computing it again; nobody
writes into a block that is kept. One that nobody owns any more stays until room is needed, the
longest unused first, so a kept block is a free block like any other.

Counts blocks; the keys and values themselves are tensors of `model/kv.py`. Knows no sequences.
"""

import hashlib
from array import array
from collections import OrderedDict


class BlockAllocator:
    """Blocks 0 to `num_blocks` - 1, each holding `block_size` tokens; keeps nothing unless told."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # The end of the list is handed out first, so that low numbers are used first.
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Kept and without an owner, the longest unused first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._kept: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, block_table: list[int], num_tokens: int) -> bool:
        """Appends blocks until the table holds `num_tokens` tokens.

        False, and nothing is taken, when there are too few free ones.
        """
        missing = self.blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._forget()
            self._num_owners[block] = 1
            block_table.append(block)
        return True

    def free(self, block_table: list[int]) -> None:
        """Gives the blocks back. The caller drops the table."""
        # From the end: a prefix outlives what follows it, which is worth nothing without it.
        for block in reversed(block_table):
            assert self._num_owners[block], f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            if block in self._hashes:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def find(self, hashes: list[bytes]) -> list[int]:
        """The kept blocks of the longest known beginning of `hashes`; takes none of them."""
        found: list[int] = []
        for content in hashes:
            if (block := self._kept.get(content)) is None:
                break
            found.append(block)
        return found

    def num_idle(self, blocks: list[int]) -> int:
        """How many of `blocks`, which are kept, are free until somebody shares them."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """Makes the caller another owner of `blocks`, which `find` returned."""
        for block in blocks:
            self._num_owners[block] += 1
            self._idle.pop(block, None)

    def keep(self, block: int, content: bytes) -> None:
        """Lets others share `block`, full and never written again, unless one like it is kept."""
        if content not in self._kept:
            self._kept[content] = block
            self._hashes[block] = content

    def _forget(self) -> int:
        """The longest unused block, which is no longer kept."""
        block, _ = self._idle.popitem(last=False)
        del self._kept[self._hashes.pop(block)]
        return block


def extend_hashes(
    hashes: list[bytes], token_ids: list[int], block_size: int, num_blocks: int
) -> None:
    """Appends to `hashes` what is missing of the first `num_blocks` blocks of `token_ids`.

    Each covers its block and, by the hash before, everything to its left. 128 bits of BLAKE2,
    because who could find two prompts of one hash would read another's context.
    """
    for block in range(len(hashes), num_blocks):
        tokens = array("q", token_ids[block * block_size : (block + 1) * block_size])
        before = hashes[-1] if hashes else b""
        hashes.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
