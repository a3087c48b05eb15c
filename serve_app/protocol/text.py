"""Token ids to text as they come: whole characters only, stop strings held back and cut.

Streamed and unstreamed answers are made by the same steps, token by token, so their text is equal.
Knows no JSON shapes and no engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve_app.protocol.stop import StopStrings

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PRIMING_TOKENS = 8
"""Prompt tokens that the decoder sees first, so that a continuation keeps its leading space."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One answered token with log probabilities, for `logprobs`."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability), best first."""
    offset: int = 0
    """Where the token's text begins in the answer, in characters."""


@dataclass(slots=True)
class Piece:
    """Everything new of one answer: text, scores, and on the last piece why it ended."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    """Tokens generated so far, those of a stop string included."""


class Detokenizer:
    """Incremental decoding on tokenizers' `DecodeStream`, which holds back split characters.

    `prompt_tail` are the last prompt ids when the answer continues the prompt's text; without
    them the answer starts afresh, and SentencePiece's leading space is dropped.
    """

    def __init__(
        self, backend: "Backend", *, prompt_tail: Sequence[int] = (), skip_special: bool = True
    ) -> None:
        self._backend = backend
        self._skip_special = skip_special
        self._pending: list[int] = []
        self._restart(prompt_tail)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:
            # Bytes that are no UTF-8 after all: DecodeStream gives up ("Invalid prefix").
            text = self._decode(self._pending)
            self._restart(self._pending)
        if text is None:
            return ""
        self._pending = []
        return str(text)

    def flush(self) -> str:
        """The rest: an incomplete character becomes U+FFFD, as in any decoder."""
        rest, self._pending = self._pending, []
        return self._decode(rest) if rest else ""

    def _restart(self, ids: Sequence[int]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(ids=list(ids), skip_special_tokens=self._skip_special)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=self._skip_special))


class TextStream:
    """One answer's text: tokens in, `Piece`s out, until `is_stopped` or `finish`."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), *, min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded = 0  # characters decoded, held ones included
        self._num_shown = 0  # characters given out
        self._waiting: list[TokenScore] = []

    @property
    def is_stopped(self) -> bool:
        """A stop string has come; the answer is complete."""
        return self._stops.found

    def push(self, token_ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> Piece:
        """What these tokens add. Tokens after a stop string are ignored, and not counted."""
        shown = ""
        for index, token_id in enumerate(token_ids):
            if self.is_stopped:
                break
            if scores:
                self._waiting.append(_at(scores[index], self._num_decoded))
            self._num_tokens += 1
            shown += self._take(self._detokenizer.push(token_id))
        return self._piece(shown, "stop" if self.is_stopped else None)

    def finish(self, reason: str) -> Piece:
        """Everything held back, with the reason of the end."""
        if self.is_stopped:
            return self._piece("", "stop")
        shown = self._take(self._detokenizer.flush())
        if self.is_stopped:
            return self._piece(shown, "stop")
        return self._piece(shown + self._stops.flush(), reason)

    def _take(self, text: str) -> str:
        self._num_decoded += len(text)
        # As for stop tokens: before min_tokens nothing ends the answer.
        if self._num_tokens < self._min_tokens:
            return self._stops.pass_over(text)
        return self._stops.push(text)

    def _piece(self, text: str, reason: str | None) -> Piece:
        """Scores go out with their token's first character; a cut token's score is dropped."""
        self._num_shown += len(text)
        everything = reason is not None and not self.is_stopped
        ready = [s for s in self._waiting if everything or s.offset < self._num_shown]
        self._waiting = self._waiting[len(ready) :]
        return Piece(text, ready, reason, self._num_tokens)


def _at(score: TokenScore, offset: int) -> TokenScore:
    return TokenScore(score.token_id, score.logprob, score.top, offset)
