"""Who computes what in the next step: first come, first served, within tokens and blocks.

A step first decodes every running sequence, then spends what is left of its tokens on chunks of
prompts, so a long prompt never stalls the streams that run. Blocks for a whole prompt are taken at
admission. When a decode finds no block, the latest arrived running sequence is preempted: it gives
its blocks back and waits at the head of the queue until its prompt and its generated tokens are
computed anew, save for what the cache still holds. Everyone that runs arrived before everyone that
waits.

With `keeps_prefixes` a sequence computes only what follows the longest beginning that the cache
knows, and leaves its own blocks to others (`keep`).

The cost of a step does not depend on how many wait. Knows no tensors, sampling or threads.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from serve_app.engine.kv_cache import BlockAllocator, extend_hashes
from serve_app.engine.sequence import Chunk, Sequence


class Scheduler:
    """Waiting and running sequences; the caller ends each with `remove`."""

    def __init__(
        self,
        blocks: BlockAllocator,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        keeps_prefixes: bool = True,
    ) -> None:
        self.blocks = blocks
        self.keeps_prefixes = keeps_prefixes
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        """In order of arrival."""
        # Ordered, with removal from the middle in constant time.
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.num_preemptions = 0
        self.num_queried_tokens = 0
        """Tokens that the cache was asked for."""
        self.num_shared_tokens = 0
        """Of those, tokens that it had, so that they were not computed."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that would fit into the cache alone, up to its last token."""
        self.waiting[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, waiting or running, and frees its blocks."""
        if sequence in self.waiting:
            del self.waiting[sequence]
        else:
            self.running.remove(sequence)
            self._release(sequence)

    def keep(self, sequence: Sequence, num_tokens: int) -> None:
        """Lets others share the blocks that its first `num_tokens` tokens have filled.

        For the caller to say when they are known to be sound: a block with a NaN, once shared,
        would fail everybody who shares it.
        """
        num_full = min(sequence.num_computed, num_tokens) // self.blocks.block_size
        if not self.keeps_prefixes or num_full <= sequence.num_kept:
            return
        self._hash(sequence, num_full)
        for index in range(sequence.num_kept, num_full):
            self.blocks.keep(sequence.block_table[index], sequence.block_hashes[index])
        sequence.num_kept = num_full

    def schedule(self, prompt_tokens: Callable[[int], int] | None = None) -> list[Chunk]:
        """The next step: at least one chunk when there is work, `max_num_batched_tokens` at most.

        None where all there is waits for tokens that are under way.

        Decodes come first. Their blocks are taken here; the caller marks what was computed.
        `prompt_tokens` says how many tokens of prompts may go with a number of decodes, at least 1.
        """
        chunks = self._decodes()
        budget = self.max_num_batched_tokens - len(chunks)
        if prompt_tokens is not None:
            budget = min(budget, prompt_tokens(len(chunks)))
        for sequence in self.running:
            if budget and sequence.num_uncomputed > 1:
                chunks.append(_chunk(sequence, budget))
                budget -= chunks[-1].end - chunks[-1].start
        while budget and self._admit():
            chunks.append(_chunk(self.running[-1], budget))
            budget -= chunks[-1].end - chunks[-1].start
        return chunks

    def _decodes(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        index = 0
        # Preemption shortens the list from its end, never below `index`.
        while index < len(self.running) and len(chunks) < self.max_num_batched_tokens:
            sequence = self.running[index]
            index += 1
            total = len(sequence.token_ids)
            # One that is complete has its last token still on its way.
            if sequence.num_computed != total - 1 or sequence.is_complete:
                continue
            has_room = total <= len(sequence.block_table) * self.blocks.block_size
            if has_room or self._make_room(sequence):
                chunks.append(Chunk(sequence, total - 1, total, True))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Takes the block its last token needs; False when it was itself preempted for it."""
        while not self.blocks.grow(sequence.block_table, len(sequence.token_ids)):
            victim = self.running.pop()
            self._release(victim)
            self.waiting[victim] = None
            self.waiting.move_to_end(victim, last=False)
            self.num_preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self) -> bool:
        """Moves the head of the queue to the running ones if it fits."""
        if not self.waiting or len(self.running) == self.max_num_seqs:
            return False
        head = next(iter(self.waiting))
        shared = self._shared_blocks(head)
        # One block for each running sequence stays free: otherwise the next decodes would
        # preempt the newcomer and waste its prefill.
        missing = self.blocks.blocks_for(len(head.token_ids)) - len(shared)
        needed = missing + self.blocks.num_idle(shared) + len(self.running)
        if self.running and needed > self.blocks.num_free:
            return False
        self.blocks.share(shared)
        head.block_table += shared
        if not self.blocks.grow(head.block_table, len(head.token_ids)):
            raise RuntimeError("a sequence was queued that can never fit into the KV cache")
        head.num_kept = len(shared)
        head.num_computed = len(shared) * self.blocks.block_size
        if self.keeps_prefixes:
            self.num_queried_tokens += len(head.token_ids)
            self.num_shared_tokens += head.num_computed
        if head.queued_s is None:
            head.queued_s = time.monotonic() - head.arrived
        del self.waiting[head]
        self.running.append(head)
        return True

    def _shared_blocks(self, sequence: Sequence) -> list[int]:
        """What the cache holds of its beginning, but for its last token: that one has to be
        computed, as its logits are what is asked for."""
        if not self.keeps_prefixes:
            return []
        self._hash(sequence, (len(sequence.token_ids) - 1) // self.blocks.block_size)
        return self.blocks.find(sequence.block_hashes)

    def _hash(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.blocks.block_size
        extend_hashes(sequence.block_hashes, sequence.token_ids, size, num_blocks)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0


def _chunk(sequence: Sequence, budget: int) -> Chunk:
    start, total = sequence.num_computed, len(sequence.token_ids)
    end = min(total, start + budget)
    return Chunk(sequence, start, end, samples=end == total)
