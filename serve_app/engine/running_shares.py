"""RunningShares: which running sequence gives its place to a waiting one of another group.

At most `max_num_seqs` sequences run at a time. If one group holds all of these places with long
answers, requests of other groups would wait until an answer ends. So a waiting sequence replaces a
running one of the group that has the most running sequences, if its own group has at least two
fewer. Example with 32 places: group a runs 32 sequences when a request of group b arrives. It
replaces the latest arrival of group a, which then has 31. If group b sends 20 requests, 16 of them
replace sequences of group a, and the others wait.

The replaced sequence is preempted: it keeps its rank and waits until a place is free. The prefix
cache usually keeps its full blocks, so that it computes only its last block again. A group that
runs alone has all places.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Numbered

from serve_app.engine.sequence import Sequence


class RunningShares:
    """Counts the running sequences of each group."""

    def __init__(self) -> None:
        self._num_running: Counter[str] = Counter()

    def began(self, sequence: Sequence) -> None:
        """Counts a sequence that begins to run."""
        self._num_running[sequence.scheduling_class.group] += 1

    def ended(self, sequence: Sequence) -> None:
        """Counts a sequence that no longer runs."""
        group = sequence.scheduling_class.group
        self._num_running[group] -= 1
        if not self._num_running[group]:
            del self._num_running[group]

    def replacement(
        self, heads: Iterable[Sequence], running: Numbered[Sequence]
    ) -> tuple[Sequence, Sequence] | None:
        """Returns the first of `heads` that replaces one of `running`, and the one it replaces.

        `running` is in order of arrival. A sequence never replaces one whose priority is smaller,
        which precedes it.
        """
        largest = max(self._num_running, key=lambda group: self._num_running[group])
        for waiting in heads:
            group, priority = waiting.scheduling_class
            if self._num_running[group] + 1 >= self._num_running[largest]:
                continue
            for sequence in reversed(running):
                its_group, its_priority = sequence.scheduling_class
                if its_group == largest and its_priority >= priority:
                    return waiting, sequence
        return None
