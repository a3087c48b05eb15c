"""The block manager: ownership of KV blocks."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.block_manager import BlockManager

OPERATIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60)
"""(table, its length in tokens; 0 frees it)."""


@given(st.integers(1, 12), st.integers(1, 5), OPERATIONS)
def test_a_block_has_one_owner_and_comes_back(
    num_blocks: int, block_size: int, operations: list[tuple[int, int]]
) -> None:
    """After any sequence of allocating and freeing, no block has two owners and none is lost."""
    blocks = BlockManager(num_blocks, block_size)
    tables: list[list[int]] = [[] for _ in range(5)]
    for index, num_tokens in operations:
        before = list(tables[index])
        if num_tokens == 0:
            blocks.free(tables[index])
            tables[index] = []
        elif blocks.allocate(tables[index], num_tokens):
            assert len(tables[index]) * block_size >= num_tokens
            assert len(tables[index]) == max(len(before), -(-num_tokens // block_size))
            assert tables[index][: len(before)] == before
        else:
            assert tables[index] == before
            assert -(-num_tokens // block_size) - len(before) > blocks.num_free
        owned = [block for table in tables for block in table]
        assert len(set(owned)) == len(owned) == blocks.num_used
        assert set(owned) <= set(range(num_blocks))
        assert blocks.num_used + blocks.num_free == num_blocks
    for table in tables:
        blocks.free(table)
    everything: list[int] = []
    assert blocks.allocate(everything, num_blocks * block_size)
    assert sorted(everything) == list(range(num_blocks))
