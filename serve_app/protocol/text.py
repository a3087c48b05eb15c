"""Converts token ids to text while they are generated: complete characters, without stop strings.

Streamed and complete answers use the same code token by token, so their text is equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.protocol.detokenizer import Detokenizer
from serve_app.protocol.scores import PromptLogprobs, TokenLogprob, TokenScore
from serve_app.protocol.stop import StopStrings
from serve_app.protocol.tool_calls import ToolCallParser
from serve_app.protocol.tools import ToolCallDelta


@dataclass(slots=True)
class TextDelta:
    """The new part of one answer: text, scores, and at the end the finish reason."""

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
            new = self._detokenizer.push(token_id)
            self._num_decoded += len(new)
            text += new if self._stops is None else self._shown(new, self._stops)
            if self._stops is not None and self._stops.found:
                return self._delta(text, "stop", is_cut=True)
        if finish_reason is None:
            return self._delta(text)
        self._held_scores += map(self._score, logprobs[len(token_ids) :])
        new = self._detokenizer.flush()
        self._num_decoded += len(new)
        if self._stops is None:
            text += new
        else:
            text += self._shown(new, self._stops)
            if self._stops.found:
                return self._delta(text, "stop", is_cut=True)
            text += self._stops.flush()
        return self._delta(text, finish_reason)

    def _score(self, new: TokenLogprob) -> TokenScore:
        top = new.top_ids, new.top_logprobs
        return TokenScore(new.token_id, new.logprob, *top, self._num_decoded)

    def _shown(self, text: str, stops: StopStrings) -> str:
        """Returns the part of new text that cannot belong to a stop string any more."""
        # Before `min_tokens`, neither a stop token nor a stop string ends the answer.
        if self._num_tokens < self._min_tokens:
            return stops.pass_over(text)
        return stops.push(text)

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
