"""Log probabilities of tokens, as the engine returns them and with their place in the text.

The candidates of a token stay arrays until a response chunk with them is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve_app.protocol.response import MIN_LOGPROB, TokenNames, finite

if TYPE_CHECKING:
    from serve_app.protocol.text import Detokenizer

T = TypeVar("T")

MAX_PER_CHUNK = 16
"""Tokens with log probabilities in one chunk of a stream. Writing 20 for each takes some 0.2 ms,
and many streams may be ready at once."""


class TokenLogprob(Protocol):
    """The log probabilities at one position, see the engine's `TokenLogprob`."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top_ids(self) -> NDArray[np.int64]: ...
    @property
    def top_logprobs(self) -> NDArray[np.float32]: ...


class PromptLogprobs(Protocol):
    """Those of successive tokens of a prompt, see the engine's `PromptLogprobs`."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> NDArray[np.float32]: ...
    @property
    def ranks(self) -> NDArray[np.int64]: ...
    @property
    def top_ids(self) -> NDArray[np.int64]: ...
    @property
    def top_logprobs(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One token with its log probabilities, for `logprobs`."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt."""
    top_ids: NDArray[np.int64] = field(compare=False)
    """The most probable tokens, best first."""
    top_logprobs: NDArray[np.float32] = field(compare=False)
    offset: int = 0
    """Where the token's text begins in the text of its prompt or its answer, in characters."""

    def top(self, count: int) -> tuple[list[int], list[float]]:
        """Ids and log probabilities, finite ones, of the `count` most probable tokens, best first.

        Raises `ValueError` for NaN.
        """
        ids: list[int] = self.top_ids[:count].tolist()
        logprobs: list[float] = self.top_logprobs[:count].tolist()
        # The last one is the least, or NaN.
        if logprobs and not logprobs[-1] >= MIN_LOGPROB:
            logprobs = [finite(logprob) for logprob in logprobs]
        return ids, logprobs


class PromptText:
    """Gives the scores of a prompt, as they come, their places in its text."""

    def __init__(self, first_id: int, detokenizer: "Detokenizer") -> None:
        """`first_id` is the prompt's first token, which has no log probability."""
        self._first_id: int | None = first_id
        self._detokenizer = detokenizer
        self._num_chars = 0

    def scores(self, new: Sequence[PromptLogprobs]) -> Iterator[TokenScore]:
        """The next tokens; the first one of the prompt before them."""
        if self._first_id is not None:
            none = np.empty(0, np.int64), np.empty(0, np.float32)
            yield self._placed(self._first_id, None, *none)
            self._first_id = None
        for some in new:
            logprobs = some.logprobs.tolist()
            for row, token_id in enumerate(some.token_ids):
                top = some.top_ids[row], some.top_logprobs[row]
                yield self._placed(token_id, logprobs[row], *top)

    def _placed(
        self,
        token_id: int,
        logprob: float | None,
        top_ids: NDArray[np.int64],
        top_logprobs: NDArray[np.float32],
    ) -> TokenScore:
        score = TokenScore(token_id, logprob, top_ids, top_logprobs, self._num_chars)
        self._num_chars += len(self._detokenizer.push(token_id))
        return score


def named(scores: Sequence[TokenScore], num_top: int, names: TokenNames) -> list[dict[str, Any]]:
    """Returns the scores in OpenAI's form, each with up to `num_top` candidates.

    Raises `ValueError` for NaN.
    """

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.token_bytes(token_id)
        text = raw.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return [
        {
            **one(score.token_id, finite(score.logprob or 0.0)),
            "top_logprobs": list(map(one, *score.top(num_top))),
        }
        for score in scores
    ]


def pieces(items: Iterator[T]) -> Iterator[list[T]]:
    """`items` in lists of at most `MAX_PER_CHUNK`; one empty list where there are none."""
    piece: list[T] = []
    for item in items:
        if len(piece) == MAX_PER_CHUNK:
            yield piece
            piece = []
        piece.append(item)
    yield piece
