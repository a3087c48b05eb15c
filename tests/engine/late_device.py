"""A device that overlaps steps; the test chooses when each of them is computed.

A slot of its KV cache holds a number that stands for all tokens up to its own. A sampled token is a
function of that number, so an answer is right only if every step found its own context.
"""

from collections import deque
from collections.abc import Callable

from serve_app.engine.block_manager import BlockManager
from serve_app.engine.runner import SampledTokens
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.sequence import PENDING, Sequence

VOCAB_SIZE = 20


def extended(context: int, token: int) -> int:
    """Returns the number of a context with one more token."""
    return (context * 1_000_003 + token + 1) % ((1 << 61) - 1)


def answer_of(prompt: list[int], max_tokens: int, stop_ids: frozenset[int]) -> list[int]:
    """Returns the answer to a prompt, computed without an engine."""
    context = 0
    for token in prompt:
        context = extended(context, token)
    answer: list[int] = []
    while len(answer) < max_tokens and (token := context % VOCAB_SIZE) not in stop_ids:
        answer.append(token)
        context = extended(context, token)
    return answer


class LateStep:
    """A launched step, as the device sees it: what the host knew at the launch."""

    def __init__(
        self,
        device: "LateDevice",
        scheduled: list[ScheduledTokens],
        before: "LateStep | None",
        cleared: set[int],
    ) -> None:
        """`cleared` has the blocks that the device clears between this step and the one before."""
        self.sampled: dict[Sequence, int] = {}
        self._device, self._before, self._cleared = device, before, cleared
        self._parts = [
            (part, part.sequence.token_ids[part.start : part.end], list(part.sequence.block_table))
            for part in scheduled
        ]

    def compute(self) -> None:
        size, slots = self._device.blocks.block_size, self._device.slots
        for slot in [slot for slot in slots if slot[0] in self._cleared]:
            del slots[slot]
        for part, token_ids, table in self._parts:
            before = part.start - 1
            context = slots[table[before // size], before % size] if part.start else 0
            for position, token in enumerate(token_ids, part.start):
                if token == PENDING:
                    assert self._before is not None
                    token = self._before.sampled[part.sequence]
                context = extended(context, token)
                slots[table[position // size], position % size] = context
            if part.is_sampled:
                self.sampled[part.sequence] = context % VOCAB_SIZE

    def wait(self) -> SampledTokens:
        self._device.compute_up_to(self)
        return SampledTokens(list(self.sampled.values()), {})


class LateDevice:
    """A `Runner`. `is_early` says for each step whether it is computed at its launch; otherwise it
    is computed when the host waits for it, or for a later one."""

    vocab_size = VOCAB_SIZE
    can_overlap_steps = True
    few_prompt_tokens = 0

    def __init__(self, is_early: Callable[[], bool]) -> None:
        self.blocks: BlockManager
        self.slots: dict[tuple[int, int], int] = {}
        self.launched: list[list[ScheduledTokens]] = []
        self._is_early = is_early
        self._queue: deque[LateStep] = deque()
        self._last: LateStep | None = None
        self._cleared: set[int] = set()

    def launch(self, scheduled: list[ScheduledTokens]) -> LateStep:
        assert len({part.is_decode for part in scheduled}) == 1, "decodes beside prefill chunks"
        self._check_owners(scheduled)
        self.launched.append(scheduled)
        self._last = LateStep(self, scheduled, self._last, self._cleared)
        self._cleared = set()
        self._queue.append(self._last)
        assert len(self._queue) <= 2, "more than two steps are in flight"
        if self._is_early():
            self.compute_up_to(self._last)
        return self._last

    def compute_up_to(self, step: LateStep) -> None:
        while step in self._queue:
            self._queue.popleft().compute()

    def clear_blocks(self, blocks: list[int]) -> None:
        self._cleared.update(blocks)

    def _check_owners(self, scheduled: list[ScheduledTokens]) -> None:
        """Asserts that each sequence writes only into blocks that it alone owns."""
        size = self.blocks.block_size
        for sequence, start, end, _ in scheduled:
            for index in range(start // size, (end - 1) // size + 1):
                block = sequence.block_table[index]
                assert self.blocks._num_owners[block] == 1, "a block with several owners is written"
                assert block not in self.blocks._hash_of, "a cached block is written"
