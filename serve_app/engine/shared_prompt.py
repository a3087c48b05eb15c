"""SharedPrompt: several sequences with the same prompt, which only one of them computes."""

import secrets
from collections.abc import Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class SharedPrompt:
    """The sequences of one prompt. Only the engine's thread changes it.

    The first sequence is the leader, which computes the prompt. The others wait until the leader
    has its first token, then share its full KV blocks. Example: a request with `n` = 4 and a prompt
    of 100 tokens computes these once; then each of the other three shares 6 blocks of 16 tokens and
    computes the last 4 tokens itself.
    """

    leader: "Sequence | None" = None
    """The sequence that computes the prompt; None before it is added, and once it is computed."""
    is_computed: bool = False
    """Whether the prompt is computed."""
    followers: "list[Sequence]" = field(default_factory=list)
    """The sequences that wait for the leader; some of them may have ended."""
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """Hashed with the tokens of its KV blocks if prefix caching is off, so that only sequences of
    this prompt share the blocks."""

    def must_wait(self, sequence: "Sequence") -> bool:
        """Adds a sequence. Returns True if it must wait because another one is the leader."""
        if self.is_computed:
            return False
        if self.leader is None:
            self.leader = sequence
            return False
        sequence.rank = self.leader.rank
        self.followers.append(sequence)
        return True

    def computed(self) -> "list[Sequence]":
        """Records that the prompt is computed. Returns the sequences that have waited for it."""
        self.leader, self.is_computed = None, True
        released, self.followers = self.followers, []
        return released

    def removed(self, sequence: "Sequence", waiting: "Container[Sequence]") -> "list[Sequence]":
        """Removes a sequence. If it was the leader, the next follower in `waiting` becomes it.

        Returns the new leader in a list, or an empty list.
        """
        if sequence is not self.leader:
            return []
        left = [each for each in self.followers if each in waiting]
        self.leader = left[0] if left else None
        self.followers = left[1:]
        return left[:1]
