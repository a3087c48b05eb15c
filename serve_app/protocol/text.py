"""Converts token ids to text while they are generated: whole characters only, stop strings cut.

Streamed and complete answers use the same code token by token, so their text is equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve_app.protocol.scores import PromptLogprobs, TokenLogprob, TokenScore
from serve_app.protocol.stop import StopStrings
from serve_app.protocol.tool_calls import MARKER, ToolCallParser
from serve_app.protocol.tools import ToolCallDelta

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.decoders import DecodeStream

PRIMING_TOKENS = 8
"""Number of prompt tokens that the decoder processes first, so that a continuation keeps its
leading space."""


@dataclass(slots=True)
class TextDelta:
    """Everything new of one answer: text, scores, and at the end the finish reason."""

    text: str
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0
    """Number of tokens generated so far, including those of a stop string."""
    stop: str | None = None
    """The stop string that ended the answer."""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    """Pieces of the tool calls after the text."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    """Log probabilities of the next prompt tokens, if the request asked for them."""


class Detokenizer:
    """Incremental decoding with tokenizers' `DecodeStream`, which withholds incomplete characters.

    `prompt_ids` is the prompt if the answer continues its text. Without it, the answer begins a new
    text, and SentencePiece's leading space is dropped. The token `tool_calls_id` is shown as
    `MARKER`, even with `skip_special`.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        prompt_ids: Sequence[int] = (),
        skip_special: bool = True,
        tool_calls_id: int | None = None,
    ) -> None:
        self._backend = backend
        self._tool_calls_id = tool_calls_id
        self._skip_special = skip_special
        self._pending: list[int] = []
        self._stream = self._begin(_tail(backend, prompt_ids) if prompt_ids else [])

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes; empty while a character is incomplete."""
        if token_id == self._tool_calls_id:
            before = self.flush()
            self._stream = self._begin([])
            return before + MARKER
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:
            # The bytes are no UTF-8: DecodeStream fails with "Invalid prefix".
            text = self._decode(self._pending)
            self._stream = self._begin(self._pending)
        if text is None:
            return ""
        self._pending = []
        return str(text)

    def flush(self) -> str:
        """Returns the remaining text. An incomplete character becomes U+FFFD, as in any decoder."""
        rest, self._pending = self._pending, []
        return self._decode(rest) if rest else ""

    def _begin(self, ids: list[int]) -> "DecodeStream":
        """Returns a new stream that has processed `ids`."""
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=ids, skip_special_tokens=self._skip_special)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=self._skip_special))


def _tail(backend: "Backend", prompt_ids: Sequence[int]) -> list[int]:
    """Returns the last ids of the prompt; none if their text ends in an incomplete character.

    DecodeStream would return a prompt's text that ends in U+FFFD as if it were new.
    """
    # A character has up to 4 bytes, each a token: one of the 4 tails begins at a character.
    for num_tokens in range(PRIMING_TOKENS, PRIMING_TOKENS + 4):
        tail = list(prompt_ids[-num_tokens:])
        if not backend.decode(tail, skip_special_tokens=True).endswith("\ufffd"):
            return tail
    return []


class TextStream:
    """The text of one answer. `push` accepts the tokens of each delta, the last one with a finish
    reason."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        tool_calls: ToolCallParser | None = None,
    ) -> None:
        """With `tool_calls`, calls in the text are returned as such."""
        self._detokenizer = detokenizer
        self._tool_calls = tool_calls
        self._stops = StopStrings(stops) if stops else None
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_decoded = 0
        """Number of decoded characters, including withheld ones."""
        self._num_shown = 0
        """Number of returned characters."""
        self._held_scores: list[TokenScore] = []

    def push(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: str | None = None,
    ) -> TextDelta:
        """Returns the text and scores that these tokens add. With `finish_reason`, also all
        withheld text.

        A stop string ends the answer with "stop". Tokens after it are ignored and not counted.
        `logprobs` may have one entry more than `token_ids`, for a stop token.
        """
        text = ""
        for index, token_id in enumerate(token_ids):
            if logprobs:
                self._held_scores.append(self._score(logprobs[index]))
            self._num_tokens += 1
            text += self._shown(self._detokenizer.push(token_id))
            if self._stops is not None and self._stops.found:
                return self._delta(text, "stop", is_cut=True)
        if finish_reason is None:
            return self._delta(text)
        self._held_scores += map(self._score, logprobs[len(token_ids) :])
        text += self._shown(self._detokenizer.flush())
        if self._stops is not None:
            if self._stops.found:
                return self._delta(text, "stop", is_cut=True)
            text += self._stops.flush()
        return self._delta(text, finish_reason)

    def _score(self, new: TokenLogprob) -> TokenScore:
        top = new.top_ids, new.top_logprobs
        return TokenScore(new.token_id, new.logprob, *top, self._num_decoded)

    def _shown(self, text: str) -> str:
        """Returns the part of new text that cannot belong to a stop string any more."""
        self._num_decoded += len(text)
        if self._stops is None:
            return text
        # As for stop tokens: nothing ends the answer before `min_tokens`.
        if self._num_tokens < self._min_tokens:
            return self._stops.pass_over(text)
        return self._stops.push(text)

    def _delta(
        self, text: str, finish_reason: str | None = None, *, is_cut: bool = False
    ) -> TextDelta:
        """Returns a delta with `text` and the scores of the tokens whose first character is
        shown."""
        self._num_shown += len(text)
        takes_all = finish_reason is not None and not is_cut
        scores = self._held_scores
        if scores:
            scores = [s for s in scores if takes_all or s.offset < self._num_shown]
            self._held_scores = self._held_scores[len(scores) :]
        stop = self._stops.found if is_cut and self._stops is not None else None
        new = TextDelta(text, scores, finish_reason, self._num_tokens, stop)
        if self._tool_calls is not None:
            _find_calls(new, self._tool_calls)
        return new


def _find_calls(new: TextDelta, parser: ToolCallParser) -> None:
    """Moves the tool calls from the text of `new` to its `tool_calls`."""
    parsed = parser.push(new.text)
    new.text, new.tool_calls = parsed.content, parsed.calls
    if new.finish_reason is not None:
        new.text += parser.end().content
        if new.finish_reason == "stop" and parser.has_called:
            new.finish_reason = "tool_calls"
