"""WaitingSequences: the waiting sequences in the order in which they are admitted.

Prompts are computed in ascending order of rank:

    rank = prompt tokens that arrived before this prompt + 2 * tokens of this prompt

So short prompts that arrive later overtake a long prompt, until as many tokens have arrived after
the long prompt as it has itself. The long prompt keeps its blocks and continues afterwards.
Example: a prompt of 30,000 tokens arrives first and has rank 60,000. The next 100 prompts of 200
tokens each have ranks 30,400 to 50,200 and overtake it. A prompt of 20,000 tokens after them has
rank 90,000 and waits.

Each group of requests (`SchedulingClass.group`) counts its own tokens, prompt and generated tokens
together. If a group has no waiting request, the count for its next request begins at the value at
which the last admitted request began. So the request overtakes the waiting requests of a busier
group (start-time fair queueing: Goyal, Vin and Cheng, SIGCOMM 1996). Example: group a sends ten
prompts of 1,000 tokens, with ranks 2,000 to 11,000, and the first is admitted. Group b then sends a
prompt of 1,000 tokens, which begins at 0, has rank 2,000 and is next. Among waiting requests, a
smaller `SchedulingClass.priority` precedes any rank.
"""

from collections.abc import Iterator
from heapq import heappop, heappush

from serve_app.engine.sequence import Sequence


class WaitingSequences:
    """Computes the ranks of sequences, and holds the sequences that wait."""

    def __init__(self) -> None:
        self._sequences: set[Sequence] = set()
        # By group: a heap of the queued sequences by rank, with some that have been removed.
        self._ranks: dict[str, list[tuple[int, int, int, Sequence]]] = {}
        # By group: its token count, at which its next prompt begins.
        self._group_ends: dict[str, int] = {}
        # The token count at which the last admitted prompt began.
        self._reached = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._sequences

    def add(self, sequence: Sequence) -> None:
        """Queues a new sequence, and computes its rank."""
        num_tokens = len(sequence.token_ids)
        group = sequence.scheduling_class.group
        begin = max(self._reached, self._group_ends.get(group, 0))
        self._group_ends[group] = begin + num_tokens
        sequence.rank = begin + 2 * num_tokens
        self.queue(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Adds a sequence that cannot be admitted until `queue` is called for it."""
        self._sequences.add(sequence)

    def queue(self, sequence: Sequence) -> None:
        """Queues a held or preempted sequence with its old rank."""
        self._sequences.add(sequence)
        heap = self._ranks.setdefault(sequence.scheduling_class.group, [])
        heappush(heap, (*rank_of(sequence), sequence))

    def heads(self) -> list[Sequence]:
        """Returns the queued sequence with the lowest rank of each group, the lowest one first."""
        for group, heap in list(self._ranks.items()):
            # A removed sequence stays in the heap until it is the first.
            while heap and heap[0][-1] not in self._sequences:
                heappop(heap)
            if not heap:
                del self._ranks[group]
        return [first[-1] for first in sorted(heap[0] for heap in self._ranks.values())]

    def admit(self, head: Sequence) -> None:
        """Removes one of the heads. Prompts of other groups begin at its token count or later."""
        self._sequences.remove(head)
        self._reached = max(self._reached, head.rank - 2 * head.num_prompt_tokens)

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence that ends before it is admitted."""
        self._sequences.remove(sequence)

    def count_answer(self, sequence: Sequence) -> None:
        """Adds the tokens that an ended sequence has generated to its group's count."""
        if group := sequence.scheduling_class.group:
            self._group_ends[group] = self._group_ends.get(group, 0) + sequence.num_output_tokens


def rank_of(sequence: Sequence) -> tuple[int, int, int]:
    """Returns the key by which sequences are ordered."""
    return sequence.scheduling_class.priority, sequence.rank, sequence.number
