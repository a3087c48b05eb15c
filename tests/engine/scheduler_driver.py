"""Drives a scheduler by hand and checks every step against a simulated KV cache.

The cache records which tokens each slot stands for. All tokens are 0 unless a test says otherwise,
so that sequences share as many blocks as possible.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass
from serve_app.engine.sequence import Sequence


def new_sequence(num_prompt: int, max_tokens: int, kind: int = 0) -> Sequence:
    """Returns a prompt of zeros, whose sixth token is `kind`."""
    token_ids = [kind if i == 5 else 0 for i in range(num_prompt)]
    return Sequence(token_ids, SamplingParams(max_tokens=max_tokens), 0, frozenset())


@dataclass
class Driver:
    """Does what the engine's core does around the scheduler, and checks every step."""

    scheduler: Scheduler
    arrived: list[Sequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    ended: Counter[Sequence] = field(default_factory=Counter)
    passed_by: defaultdict[Sequence, set[Sequence]] = field(
        default_factory=lambda: defaultdict(set)
    )
    """Later sequences whose prompts were computed while an earlier one's waited."""
    slots: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """The keys and values of (block, offset), as the tokens that they were computed from."""

    def add(self, num_prompt: int, max_tokens: int, kind: int = 0) -> Sequence:
        return self.add_of(DEFAULT_CLASS, num_prompt, max_tokens, kind)

    def add_of(
        self, scheduling_class: SchedulingClass, num_prompt: int, max_tokens: int, kind: int = 0
    ) -> Sequence:
        sequence = new_sequence(num_prompt, max_tokens, kind)
        sequence.scheduling_class = scheduling_class
        self.arrived.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        if not self.ended[sequence]:
            self.scheduler.remove(sequence)
            self.ended[sequence] += 1

    def step(self) -> list[ScheduledTokens]:
        if not self.scheduler.has_work:
            return []
        running = list(self.scheduler.running)
        decoding = [s for s in running if s.num_uncomputed_tokens == 1]
        scheduled = self.scheduler.schedule()
        self.check(scheduled, decoding)
        self.check_order(scheduled, running, decoding)
        for sequence, start, end, is_sampled in scheduled:
            if sequence not in self.admitted:
                self.admitted.append(sequence)
            for position in range(start, end):
                self.slots[self.slot(sequence, position)] = sequence.token_ids[: position + 1]
            sequence.num_computed_tokens = end
            if is_sampled:
                self.scheduler.cache_blocks(sequence, sequence.num_computed_tokens)
                sequence.token_ids.append(0)
                if sequence.num_output_tokens == sequence.params.max_tokens:
                    self.scheduler.remove(sequence)
                    self.ended[sequence] += 1
        return scheduled

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block, offset = divmod(position, self.scheduler.blocks.block_size)
        return sequence.block_table[block], offset

    def check(self, scheduled: list[ScheduledTokens], decoding: list[Sequence]) -> None:
        scheduler = self.scheduler
        assert (
            0
            < sum(end - start for _, start, end, _ in scheduled)
            <= scheduler.max_num_batched_tokens
        )
        assert len({sequence for sequence, *_ in scheduled}) == len(scheduled)
        for sequence, start, end, is_sampled in scheduled:
            assert sequence in scheduler.running
            assert sequence.num_computed_tokens == start < end <= len(sequence.token_ids)
            assert is_sampled == (end == len(sequence.token_ids))
            assert len(sequence.block_table) * scheduler.blocks.block_size >= end
        sequences = [sequence for sequence, *_ in scheduled]
        alive = [s for s in decoding if s in scheduler.running]
        assert sequences[: len(alive)] == alive, "a running stream was stalled"
        assert len(scheduler.running) <= scheduler.max_num_seqs
        owned = [block for s in scheduler.running for block in s.block_table]
        assert len(set(owned)) == scheduler.blocks.num_used
        for sequence in scheduler.running:
            for position in range(sequence.num_computed_tokens):
                seen = self.slots[self.slot(sequence, position)]
                assert seen == sequence.token_ids[: position + 1], "another sequence's tokens"
        alive = [s for s in self.arrived if not self.ended[s]]
        assert scheduler.running == [s for s in alive if s not in scheduler.waiting]
        assert not any(s.block_table or s.num_computed_tokens for s in scheduler.waiting)

    def check_order(
        self,
        scheduled: list[ScheduledTokens],
        running: list[Sequence],
        decoding: list[Sequence],
    ) -> None:
        """The latest arrivals were preempted, and a prompt is passed by fewer tokens than it has.

        Both hold within each group and priority.

        `running` and `decoding` are sequences before the step.
        """
        place = self.arrived.index
        preempted = [s for s in running if s in self.scheduler.waiting]
        for each in {s.scheduling_class for s in preempted}:
            of_class = [s for s in running if s.scheduling_class == each]
            latest = [s for s in of_class if s in preempted]
            assert of_class[-len(latest) :] == latest, "not the latest arrival was preempted"
        ends = {part.sequence: part.end for part in scheduled}
        for waiting in self.arrived:
            computed = ends.get(waiting, waiting.num_computed_tokens)
            if self.ended[waiting] or computed >= len(waiting.token_ids) - 1:
                continue
            self.passed_by[waiting] |= {
                part.sequence
                for part in scheduled
                if part.sequence not in decoding
                and part.sequence.scheduling_class == waiting.scheduling_class
                and place(part.sequence) > place(waiting)
            }
            passed = sum(s.num_prompt_tokens for s in self.passed_by[waiting])
            assert passed < waiting.num_prompt_tokens
