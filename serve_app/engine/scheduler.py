"""Scheduler: chooses the tokens of the next step.

A step first decodes one token of every running sequence. The rest of its `max_num_batched_tokens`
is used for prefill chunks, within the limits of the prefill policy. Example with 512 tokens per
step and no other limit: while 20 sequences decode, a prompt of 1,000 tokens is computed in three
steps. Each step has 20 decodes, and 492, 492 and 16 tokens of the prompt.

Prompts are computed in ascending order of rank; see `waiting_sequences.py`.

A sequence gets the KV blocks for its whole prompt when it is admitted. If a decode finds no free
block, the running sequence that arrived last is preempted: its blocks are freed, and it waits with
its old rank until its prompt and its generated tokens are computed again. Sequences are admitted in
order of rank only, and never in a step that preempts one for its blocks.

If `max_num_seqs` sequences run, a waiting sequence may replace a running one of another group; see
`running_shares.py`.

The cost of a step does not depend on the number of waiting sequences.
"""

import time
from bisect import insort

from serve_app.engine.block_manager import BlockManager, extend_hashes
from serve_app.engine.prefill_policy import Policy, PrefillBudget
from serve_app.engine.running_shares import RunningShares
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_cost import StepShape, shape_of
from serve_app.engine.step_sizes import MAX_SCORED_TOKENS
from serve_app.engine.waiting_sequences import WaitingSequences, rank_of


class Scheduler:
    """Holds the waiting and the running sequences until `remove` is called for each."""

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.blocks = blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.running: list[Sequence] = []
        """In order of arrival."""
        self.waiting = WaitingSequences()
        self._shares = RunningShares()
        self._num_added = 0
        self.unchecked_blocks: list[int] = []
        """Freed KV blocks that may hold values that are not finite, because their sequence ended
        before finite logits proved the opposite. The caller clears them before the next step."""
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        """Number of tokens looked up in the prefix cache."""
        self.prefix_cache_hits = 0
        """Number of tokens found in the prefix cache and not computed again."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, which must fit into the empty KV cache."""
        self._num_added += 1
        sequence.number = self._num_added
        if sequence.shared_prompt is not None and sequence.shared_prompt.must_wait(sequence):
            self.waiting.hold(sequence)
        else:
            self.waiting.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a waiting or running sequence and frees its blocks."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._stop(sequence)
        self.waiting.count_answer(sequence)
        if sequence.shared_prompt is not None:
            for follower in sequence.shared_prompt.removed(sequence, self.waiting):
                self.waiting.queue(follower)

    def schedule(self, policy: Policy | None = None) -> list[ScheduledTokens]:
        """Returns the next step, decodes first, with at most `max_num_batched_tokens` tokens.

        Returns an empty list if there is no work, or if every running sequence waits for its last
        token from an in-flight step. Without a `policy`, prompts get all remaining tokens.

        Allocates the KV blocks of the step. The caller calls `mark_launched`.
        """
        num_preemptions = self.num_preemptions
        decodes = self.schedule_decodes()
        can_admit = self.num_preemptions == num_preemptions
        prompts = self._schedule_prompts(policy, shape_of(decodes), can_admit=can_admit)
        return _with_blocks(decodes) + prompts

    def schedule_decodes(self) -> list[ScheduledTokens]:
        """Returns the decodes of `schedule` only."""
        decodes: list[ScheduledTokens] = []
        index = 0
        # Preemption shortens the list from its end, never below `index`.
        while index < len(self.running) and len(decodes) < self.max_num_batched_tokens:
            sequence = self.running[index]
            index += 1
            if sequence.is_decoding and self._make_room(sequence):
                total = len(sequence.token_ids)
                decodes.append(ScheduledTokens(sequence, total - 1, total, True))
        return decodes

    def schedule_prompts(self, policy: Policy | None) -> list[ScheduledTokens]:
        """Returns the prefill chunks of `schedule` only, for a step before the next decodes.

        A new sequence with a single uncomputed token is computed with the decodes instead.
        """
        contexts = [len(s.token_ids) - 1 for s in self.running if s.is_decoding]
        decodes = StepShape(len(contexts), sum(contexts), 0, 0)
        return [part for part in self._schedule_prompts(policy, decodes) if not part.is_decode]

    def _schedule_prompts(
        self, policy: Policy | None, decodes: StepShape, *, can_admit: bool = True
    ) -> list[ScheduledTokens]:
        """Returns prefill chunks in the order of rank, within the policy's budget.

        Merges two lists: the running sequences whose prompt is not computed, and the waiting ones.
        Example: a running prompt of rank 60,000 pauses while waiting ones of lower ranks are
        admitted and computed, then continues. If the next waiting sequence does not fit, the step
        admits no other one, and continues with the running prompts.
        """
        step: list[ScheduledTokens] = []
        left = self.max_num_batched_tokens - decodes.num_decodes
        budget = policy.budget(decodes, left) if policy else PrefillBudget(left)
        admitted = [s for s in self.running if s.num_uncomputed_tokens > 1]
        admitted.sort(key=rank_of, reverse=True)
        new = self._next_waiting() if can_admit else None
        while budget.is_open:
            if new and not (admitted and rank_of(admitted[-1]) < rank_of(new[0])):
                has_room = self._admit(*new)
                if has_room:
                    _add_prefill_chunk(step, new[0], budget)
                new = self._next_waiting() if has_room else None
            elif admitted:
                _add_prefill_chunk(step, admitted.pop(), budget)
            else:
                break
        return _with_blocks(step)

    def _next_waiting(self) -> tuple[Sequence, Sequence | None] | None:
        """Returns the waiting sequence with the lowest rank that may be admitted, and the running
        one that it replaces, if any. Returns None if no sequence may be admitted."""
        heads = self.waiting.heads()
        if len(self.running) == self.max_num_seqs:
            return self._shares.replacement(heads, self.running)
        return (heads[0], None) if heads else None

    def cache_blocks(self, sequence: Sequence, num_tokens: int) -> None:
        """Puts the full blocks of the first `num_tokens` tokens into the prefix cache.

        The logits of these tokens must be finite: a cached block with a NaN would fail every
        sequence that shares it. Sequences that wait for this shared prompt are queued.
        """
        num_full = min(sequence.num_computed_tokens, num_tokens) // self.blocks.block_size
        if self._shares_blocks(sequence) and num_full > sequence.num_cached_blocks:
            self._extend_hashes(sequence, num_full)
            for index in range(sequence.num_cached_blocks, num_full):
                self.blocks.cache(sequence.block_table[index], sequence.block_hashes[index])
            sequence.num_cached_blocks = num_full
        prompt = sequence.shared_prompt
        if prompt is not None and prompt.leader is sequence:
            for follower in prompt.computed():
                if follower in self.waiting:  # false if it has been aborted
                    self.waiting.queue(follower)

    def _shares_blocks(self, sequence: Sequence) -> bool:
        return self.enable_prefix_caching or sequence.shared_prompt is not None

    def _extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        """Extends the sequence's block hashes to `num_full` blocks.

        Without prefix caching, a salt restricts sharing to the sequences of one `SharedPrompt`.
        """
        prompt = sequence.shared_prompt
        salt = b"" if prompt is None or self.enable_prefix_caching else prompt.salt
        hashes, size = sequence.block_hashes, self.blocks.block_size
        extend_hashes(hashes, sequence.token_ids, size, num_full, salt)

    def _make_room(self, sequence: Sequence) -> bool:
        """Allocates the block of the last token, and preempts sequences until it is free.

        Returns False if `sequence` itself is preempted.
        """
        while not self.blocks.allocate(sequence.block_table, len(sequence.token_ids)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Moves a running sequence to the waiting ones, with its old rank."""
        self.running.remove(victim)
        self._stop(victim)
        self.waiting.queue(victim)
        self.num_preemptions += 1

    def _admit(self, head: Sequence, replaced: Sequence | None) -> bool:
        """Moves `head` from the waiting to the running sequences, and preempts `replaced`.

        Returns False, and changes nothing, if `head` does not fit.

        Example with blocks of 16 tokens: a prompt of 160 tokens needs 10 blocks, of which 6 are
        cached, so 4 are missing. 2 of the cached ones have no owner, so they count as free until
        this sequence shares them. With 5 running sequences it fits if 4 + 2 + 5 = 11 blocks are
        free. Raises `RuntimeError` if it can never fit.
        """
        cached = self._find_cached(head)
        # One block per running sequence stays free. Otherwise the next decodes would preempt the
        # new sequence, and its prefill would be wasted.
        missing = self.blocks.num_blocks_for(len(head.token_ids)) - len(cached)
        needed = missing + self.blocks.num_evictable(cached) + len(self.running)
        if self.running and needed > self.blocks.num_free:
            return False
        if replaced is not None:
            self._preempt(replaced)
        self.blocks.share(cached)
        head.block_table += cached
        if not self.blocks.allocate(head.block_table, len(head.token_ids)):
            raise RuntimeError("a sequence was queued that can never fit into the KV cache")
        head.num_cached_blocks = len(cached)
        head.num_computed_tokens = len(cached) * self.blocks.block_size
        head.num_finite_tokens = head.num_computed_tokens
        if self.enable_prefix_caching:
            self.prefix_cache_queries += len(head.token_ids)
            self.prefix_cache_hits += head.num_computed_tokens
        if head.num_prompt_cached is None:
            head.num_prompt_cached = head.num_computed_tokens
        if head.queued_s is None:
            head.queued_s = time.monotonic() - head.arrival_time
        self.waiting.admit(head)
        self._shares.began(head)
        insort(self.running, head, key=_number)
        return True

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Returns the cached blocks of the sequence's longest cached prefix.

        The last token is excluded: it is always computed, because the step needs its logits.
        """
        if not self._shares_blocks(sequence) or sequence.needs_scores:
            return []
        num_full = (len(sequence.token_ids) - 1) // self.blocks.block_size
        self._extend_hashes(sequence, num_full)
        return self.blocks.find_cached(sequence.block_hashes)

    def _stop(self, sequence: Sequence) -> None:
        """Frees the blocks of a sequence that no longer runs."""
        self._shares.ended(sequence)
        if sequence.num_finite_tokens < sequence.num_computed_tokens:
            first = max(
                sequence.num_finite_tokens // self.blocks.block_size, sequence.num_cached_blocks
            )
            self.unchecked_blocks += sequence.block_table[first:]
        self.blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = sequence.num_finite_tokens = 0


def _number(sequence: Sequence) -> int:
    return sequence.number


def _with_blocks(step: list[ScheduledTokens]) -> list[ScheduledTokens]:
    """Returns the parts whose sequences were not preempted after they had been scheduled."""
    return [part for part in step if part.sequence.block_table]


def _add_prefill_chunk(
    step: list[ScheduledTokens], sequence: Sequence, budget: PrefillBudget
) -> None:
    start, total = sequence.num_computed_tokens, len(sequence.token_ids)
    num_tokens = total - start
    if sequence.needs_scores:
        num_tokens = min(num_tokens, MAX_SCORED_TOKENS - sum(part.num_scored for part in step))
    end = start + budget.take(start, num_tokens) if num_tokens else start
    if end > start:
        step.append(ScheduledTokens(sequence, start, end, is_sampled=end == total))
