"""Echo: the prompt's text before an answer, and the log probabilities of its tokens."""

from collections.abc import Iterator
from dataclasses import replace

from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import TokenNames, finite
from serve_app.protocol.scores import PromptText, TokenScore
from serve_app.protocol.text import TextDelta


class Echo:
    """The text and the scores to return before one answer. Both may be empty."""

    def __init__(self, text: str = "", prompt: PromptText | None = None) -> None:
        """With `prompt`, the scores of the prompt's tokens are returned too."""
        self._text = text
        self._num_chars = len(text)
        self._prompt = prompt

    def before(self, delta: TextDelta) -> tuple[str, Iterator[TokenScore]]:
        """Returns the text and the scores of `delta`; the first call adds the echo before them."""
        text, self._text = self._text + delta.text, ""
        if self._prompt is None and not self._num_chars:
            return text, iter(delta.scores)
        return text, self._scores(delta)

    def _scores(self, delta: TextDelta) -> Iterator[TokenScore]:
        # A prompt is scored before its answer begins.
        has_scores = delta.prompt_logprobs or delta.scores or delta.finish_reason
        if self._prompt is not None and has_scores:
            yield from self._prompt.scores(delta.prompt_logprobs)
        for score in delta.scores:
            yield replace(score, offset=score.offset + self._num_chars)


def prompt_logprobs(whole: TextDelta, num_top: int, names: TokenNames) -> list[JsonObject | None]:
    """Returns vLLM's `prompt_logprobs`: an object by token id for each prompt token; None for the
    first."""

    def entry(token_id: int, logprob: float, rank: int) -> JsonObject:
        text = names.token_bytes(token_id).decode(errors="replace")
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}

    positions: list[JsonObject | None] = [None]
    for piece in whole.prompt_logprobs:
        columns = (piece.logprobs, piece.ranks, piece.top_ids, piece.top_logprobs)
        rows = zip(piece.token_ids, *(column.tolist() for column in columns), strict=True)
        for token_id, logprob, rank, top_ids, top_logprobs in rows:
            by_token_id = {str(token_id): entry(token_id, logprob, rank)}
            top = zip(top_ids[:num_top], top_logprobs[:num_top], strict=True)
            for place, (candidate, value) in enumerate(top, start=1):
                by_token_id.setdefault(str(candidate), entry(candidate, value, place))
            positions.append(by_token_id)
    return positions
