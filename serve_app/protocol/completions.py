"""OpenAI's completions: continues raw text, for one prompt or several.

Protocol: https://platform.openai.com/docs/api-reference/completions.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.choices import ChoiceSampling, StreamUsage
from serve_app.protocol.echo import Echo, prompt_logprobs
from serve_app.protocol.field_errors import no_unicode
from serve_app.protocol.field_types import Integer
from serve_app.protocol.response import ResponseMetadata, TokenNames, detailed_usage, finite
from serve_app.protocol.scores import TokenScore, pieces
from serve_app.protocol.text import TextDelta
from serve_app.protocol.unsupported import UNSUPPORTED

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
"""Maximum number of answers to all prompts of a request together."""

Prompt = str | list[int]


class CompletionRequest(ChoiceSampling):
    """`POST /v1/completions`. `prompts` is the field `prompt`, always as a list."""

    UNSUPPORTED = UNSUPPORTED | {
        "add_special_tokens": ((True,), "a text begins with BOS; send token ids for none")
    }

    prompts: list[Any] = Field(alias="prompt")
    echo: bool = False
    """Whether the prompt's text is returned before the answer's."""
    logprobs: Integer | None = Field(default=None, ge=0, le=20)
    """With `echo`, also for the prompt's tokens."""
    prompt_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    """Adds the log probabilities of the prompt's tokens to each choice (vLLM's field)."""
    max_tokens: Integer | None = Field(default=None, ge=0)
    """0 only scores the prompt."""

    @property
    def num_logprobs(self) -> int | None:
        """Number of log probabilities per token, see `SamplingParams`."""
        return 0 if self.logprobs is None and self.best_of else self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same as `num_logprobs`, for the tokens of the prompt."""
        counts = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in counts if count is not None), default=None)

    @field_validator("prompts", mode="before")
    @classmethod
    def _list_of_prompts(cls, value: Any) -> list[Prompt]:
        prompts = [value] if isinstance(value, str) or _are_ids(value) else value
        if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS:
            raise InvalidRequest(f"`prompt` takes up to {MAX_PROMPTS} prompts.", param="prompt")
        if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
            raise InvalidRequest(
                "`prompt` should be a string, a list of strings, a list of token ids, or a list "
                "of lists of token ids.",
                param="prompt",
            )
        if not prompts or not all(prompts):
            raise InvalidRequest("`prompt` should not be empty.", param="prompt")
        return [
            _text(prompt) if isinstance(prompt, str) else list(map(int, prompt))
            for prompt in prompts
        ]

    @model_validator(mode="after")
    def _few_answers(self) -> "CompletionRequest":
        if self.num_answers * len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(
                f"`n` (or `best_of`) times the number of prompts may be {MAX_PROMPTS} at most.",
                param="best_of" if self.is_ranked else "n",
            )
        return self

    @model_validator(mode="after")
    def _scores_fit(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequest(
                "`max_tokens` may be 0 only with `echo` or `prompt_logprobs`.", param="max_tokens"
            )
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest(
                "`prompt_logprobs` cannot be streamed; use `echo` with `logprobs`.",
                param="prompt_logprobs",
            )
        return self


class CompletionResponse:
    """Creates the response to one request: the whole body, or its chunks.

    With `n` choices per prompt, choice `index` answers prompt `index // n`.
    """

    def __init__(
        self,
        request: CompletionRequest,
        metadata: ResponseMetadata,
        num_prompt_tokens: Sequence[int],
        echoes: Sequence[Echo],
        names: TokenNames,
    ) -> None:
        """`num_prompt_tokens` has one number per prompt, `echoes` one per choice."""
        self._request, self._names = request, names
        self._num_prompt_tokens = num_prompt_tokens
        self._echoes = echoes
        self._totals = StreamUsage(sum(num_prompt_tokens), len(echoes))
        self._fields: JsonObject = {
            "id": f"cmpl-{metadata.id}",
            "object": "text_completion",
            "created": metadata.created,
            "model": metadata.model,
            "system_fingerprint": metadata.fingerprint,
        }

    def body(self, wholes: Sequence[TextDelta]) -> JsonObject:
        """Returns all answers that were generated, in the order of the prompts, as one object."""
        totals = self._request.usage(sum(self._num_prompt_tokens), wholes)
        chosen = self._request.chosen(wholes)
        choices = [self._whole(index, whole) for index, whole in enumerate(chosen)]
        return {**self._fields, "choices": choices, "usage": totals}

    def _whole(self, index: int, whole: TextDelta) -> JsonObject:
        echo = self._echoes[index]
        text, scores = echo.before(whole)
        choice = self._choice(index, text, list(scores), whole.finish_reason)
        if (num_top := self._request.prompt_logprobs) is not None:
            choice["prompt_logprobs"] = prompt_logprobs(whole, num_top, self._names)
        return choice

    def chunks(self, index: int, delta: TextDelta) -> Iterator[JsonObject]:
        """Yields the chunks for a delta of choice `index`.

        With `include_usage`, the usage of all choices follows the end of the last one. With
        `continuous_usage_stats`, each chunk has the usage of its own choice so far.
        """
        usage = self._request.stream_options
        extra: JsonObject = {"usage": None} if usage.include_usage else {}
        if usage.include_usage and usage.continuous_usage_stats:
            num_prompt_tokens = self._num_prompt_tokens[index // self._request.n]
            counts = num_prompt_tokens, delta.num_tokens, delta.num_cached_tokens
            extra = {"usage": detailed_usage(*counts)}
        text, all_scores = self._echoes[index].before(delta)
        waiting: list[TokenScore] | None = None
        for scores in pieces(all_scores):
            if waiting is not None:
                yield {**self._fields, "choices": [self._choice(index, text, waiting)], **extra}
                text = ""
            waiting = scores
        if text or waiting or delta.finish_reason:
            choice = self._choice(index, text, waiting or [], delta.finish_reason)
            yield {**self._fields, "choices": [choice], **extra}
        if delta.finish_reason is not None:
            totals = self._totals.ended(delta, is_first=index % self._request.n == 0)
            if extra and totals is not None:
                yield {**self._fields, "choices": [], "usage": totals}

    def _choice(
        self,
        index: int,
        text: str,
        scores: Sequence[TokenScore],
        finish_reason: str | None = None,
    ) -> JsonObject:
        logprobs = None
        if self._request.logprobs is not None and (scores or finish_reason):
            logprobs = _logprobs(scores, self._request.logprobs, self._names)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


def _logprobs(scores: Sequence[TokenScore], num_top: int, names: TokenNames) -> JsonObject:
    def name(token_id: int) -> str:
        raw = names.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # OpenAI's spelling of an incomplete character.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def top(score: TokenScore) -> dict[str, float] | None:
        if score.logprob is None:
            return None
        ids, logprobs = score.top(num_top)
        # Two tokens may have one name; the more probable one stays.
        logprobs_by_name = dict(zip(map(name, reversed(ids)), reversed(logprobs), strict=True))
        logprobs_by_name = dict(reversed(logprobs_by_name.items()))
        logprobs_by_name.setdefault(name(score.token_id), finite(score.logprob))
        return logprobs_by_name

    def own(score: TokenScore) -> float | None:
        return None if score.logprob is None else finite(score.logprob)

    return {
        "tokens": [name(score.token_id) for score in scores],
        "token_logprobs": [own(score) for score in scores],
        "top_logprobs": [top(score) for score in scores],
        "text_offset": [score.offset for score in scores],
    }


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_id, value))


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise no_unicode("prompt") from None
    return text


def _is_id(value: Any) -> bool:
    # As `fields.Integer`, which would take longer for many ids.
    return type(value) is int or (type(value) is float and value.is_integer())


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or value == [] or _are_ids(value)
