"""Constraint: the tokens that a grammar allows next in one sequence.

The engine knows this interface only; `protocol/grammar.py` implements it with a grammar library.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The state of a grammar behind the tokens of one answer so far."""

    def fill(self, allowed: NDArray[np.int32]) -> None:
        """Writes the tokens that may come next into `allowed`, int32 `[ceil(vocab_size / 32)]`.

        Each token is one bit, from the lowest. No bit is set where the grammar `has_failed`.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Appends a token that was allowed."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether the grammar has become too complex; the answer then ends with an error."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether no token may follow, so that the answer ends."""
        ...


class Grammar(Protocol):
    """A compiled grammar, which several answers may follow."""

    def start(self) -> Constraint:
        """The state before the first token."""
        ...
