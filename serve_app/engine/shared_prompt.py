"""SharedPrompt: several sequences with one prompt, which only the first of them computes."""

import secrets
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class SharedPrompt:
    """What the sequences of one prompt know of each other. The engine's thread alone uses it.

    The others wait until the first has its first token, and then share its full KV blocks.
    """

    leader: "Sequence | None" = None
    """The sequence that computes the prompt; None before the first, and once it is computed."""
    is_computed: bool = False
    followers: "list[Sequence]" = field(default_factory=list)
    """The sequences that wait for the leader; some of them may have ended."""
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """Begins the hashes of its KV blocks where requests share none among each other."""

    def must_wait(self, sequence: "Sequence") -> bool:
        """Adds a sequence; returns whether another one computes its prompt at present."""
        if self.is_computed:
            return False
        if self.leader is None:
            self.leader = sequence
            return False
        sequence.rank = self.leader.rank
        self.followers.append(sequence)
        return True

    def computed(self) -> "list[Sequence]":
        """Notes that the prompt is computed; returns the sequences that have waited for it."""
        self.leader, self.is_computed = None, True
        released, self.followers = self.followers, []
        return released

    def removed(self, sequence: "Sequence", waiting: "Container[Sequence]") -> "list[Sequence]":
        """Forgets a sequence; where it was the leader, returns the next one of `waiting`."""
        if sequence is not self.leader:
            return []
        left = [each for each in self.followers if each in waiting]
        self.leader = left[0] if left else None
        self.followers = left[1:]
        return left[:1]
