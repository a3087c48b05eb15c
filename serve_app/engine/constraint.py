"""Constraint: the engine's interface to a grammar library, which computes the allowed next tokens.

`protocol/grammar.py` implements it.
"""

from collections.abc import Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """The state of a grammar after the tokens of one answer so far."""

    def fill(self, allowed: NDArray[np.int32]) -> None:
        """Writes the tokens that may come next into `allowed`, int32 `[ceil(vocab_size / 32)]`.

        Token t is bit t % 32 of word t // 32, counted from the lowest bit. No bit is set if the
        grammar `has_failed`.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Advances the state by one token, which must be allowed."""
        ...

    def allows_only(self, token_ids: Collection[int]) -> bool:
        """Returns whether all allowed next tokens are in `token_ids`. False if the grammar
        `has_failed`."""
        ...

    @property
    def has_failed(self) -> bool:
        """Whether the library gave up because the grammar is too complex. The answer then ends with
        an error."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows no further token. The answer then ends."""
        ...


class Grammar(Protocol):
    """A compiled grammar, which several answers may use."""

    def start(self) -> Constraint:
        """Returns a new state before the first token."""
        ...
