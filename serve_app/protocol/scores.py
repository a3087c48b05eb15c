"""Log probabilities of tokens, and the position of each token in the text.

The candidates of a token stay arrays until they are written into a response chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.response import MIN_LOGPROB, TokenNames, finite

T = TypeVar("T")

MAX_PER_CHUNK = 16
"""Maximum number of tokens with log probabilities in one chunk of a stream. Writing 20 candidates
for each takes about 0.2 ms, and many streams may be ready at the same time."""


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
    """The log probabilities of successive prompt tokens, see the engine's `PromptLogprobs`."""

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
    """Position of the token's text in the text of its prompt or answer, in characters."""

    def top(self, count: int) -> tuple[list[int], list[float]]:
        """Returns the ids and finite log probabilities of the `count` most probable tokens, best
        first.

        Raises `ValueError` for NaN.
        """
        ids: list[int] = self.top_ids[:count].tolist()
        logprobs: list[float] = self.top_logprobs[:count].tolist()
        # The last log probability is the smallest one, or NaN.
        if logprobs and not logprobs[-1] >= MIN_LOGPROB:
            logprobs = [finite(logprob) for logprob in logprobs]
        return ids, logprobs


class PromptText:
    """Adds the position in the text to the scores of a prompt, in the order of its tokens."""

    def __init__(self, first_id: int, detokenizer: Detokenizer) -> None:
        """`first_id` is the prompt's first token, which has no log probability."""
        self._first_id: int | None = first_id
        self._detokenizer = detokenizer
        self._num_chars = 0

    def scores(self, new: Sequence[PromptLogprobs]) -> Iterator[TokenScore]:
        """Yields the scores of the next tokens. The first call begins with the prompt's first
        token."""
        if self._first_id is not None:
            none = np.empty(0, np.int64), np.empty(0, np.float32)
            yield self._placed(self._first_id, None, *none)
            self._first_id = None
        for piece in new:
            logprobs = piece.logprobs.tolist()
            for row, token_id in enumerate(piece.token_ids):
                top = piece.top_ids[row], piece.top_logprobs[row]
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
    """Yields `items` in lists of at most `MAX_PER_CHUNK`; one empty list if there are none."""
    piece: list[T] = []
    for item in items:
        if len(piece) == MAX_PER_CHUNK:
            yield piece
            piece = []
        piece.append(item)
    yield piece
