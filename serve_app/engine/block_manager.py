"""BlockManager: allocates KV blocks, and finds cached blocks for a prefix.

Sequences with a common prefix share its blocks (automatic prefix caching, as in vLLM). A block that
is full and computed is cached under a hash of its tokens and of all tokens before them. A cached
block is never written again. When its last owner frees it, it stays in the cache and counts as
free. When no unused block is left, the least recently used of these blocks is evicted.

Example with `block_size` 16: sequence A has a prompt of 40 tokens and gets blocks [0, 1, 2]. After
its prefill, blocks 0 and 1 are full and are cached; block 2 has 8 tokens and is not. Sequence B
begins with the same 32 tokens: it shares blocks 0 and 1 (two owners each), gets block 3 for itself
and computes only the tokens from position 32 on. After both have ended, blocks 2 and 3 are unused,
and blocks 0 and 1 are evictable; all four count as free.

The manager works with block numbers. The keys and values themselves are in `model/kv.py`.
"""

import hashlib
from array import array
from collections import OrderedDict


class BlockManager:
    """Blocks 0 to `num_blocks` - 1 of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Free blocks that are not cached, popped from the end: low numbers come first.
        self._unused = list(range(num_blocks - 1, -1, -1))
        # Cached blocks without an owner, the least recently used first.
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._unused) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def allocate(self, block_table: list[int], num_tokens: int) -> bool:
        """Appends blocks to `block_table` until it has room for `num_tokens` tokens.

        Returns False and allocates nothing if too few blocks are free.
        """
        missing = self.num_blocks_for(num_tokens) - len(block_table)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._unused.pop() if self._unused else self._evict()
            self._num_owners[block] = 1
            block_table.append(block)
        return True

    def free(self, block_table: list[int]) -> None:
        """Removes one owner from each block. The caller must not use the table again."""
        # From the end: a block is then evicted before the blocks of its prefix.
        for block in reversed(block_table):
            assert self._num_owners[block], f"block {block} is freed twice"
            self._num_owners[block] -= 1
            if self._num_owners[block]:
                continue
            if block in self._hash_of:
                self._evictable[block] = None
            else:
                self._unused.append(block)

    def find_cached(self, hashes: list[bytes]) -> list[int]:
        """Returns the blocks of the longest cached prefix of `hashes`, without adding an owner."""
        blocks: list[int] = []
        for block_hash in hashes:
            if (block := self._cached.get(block_hash)) is None:
                break
            blocks.append(block)
        return blocks

    def num_evictable(self, blocks: list[int]) -> int:
        """Returns how many of `blocks`, which are all cached, have no owner and count as free."""
        return sum(block in self._evictable for block in blocks)

    def share(self, blocks: list[int]) -> None:
        """Adds one owner to each of `blocks`, which `find_cached` returned."""
        for block in blocks:
            self._num_owners[block] += 1
            self._evictable.pop(block, None)

    def cache(self, block: int, block_hash: bytes) -> None:
        """Caches a full block, unless another block is already cached under the same hash."""
        if block_hash not in self._cached:
            self._cached[block_hash] = block
            self._hash_of[block] = block_hash

    def _evict(self) -> int:
        """Removes the least recently used block from the cache and returns it."""
        block, _ = self._evictable.popitem(last=False)
        del self._cached[self._hash_of.pop(block)]
        return block


def extend_hashes(
    hashes: list[bytes],
    token_ids: list[int],
    block_size: int,
    num_blocks: int,
    salt: bytes = b"",
) -> None:
    """Appends hashes until `hashes` covers the first `num_blocks` blocks of `token_ids`.

    A block's hash covers its tokens and the hash before it, hence all tokens before it. The hash is
    128 bits of BLAKE2: two prompts with one hash would read each other's context, so a collision
    must be infeasible to construct. Different salts give different hashes for the same tokens.
    """
    for block in range(len(hashes), num_blocks):
        tokens = array("q", token_ids[block * block_size : (block + 1) * block_size])
        before = hashes[-1] if hashes else salt
        hashes.append(hashlib.blake2b(before + tokens.tobytes(), digest_size=16).digest())
