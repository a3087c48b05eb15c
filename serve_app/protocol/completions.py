"""OpenAI's completions: continues raw text, for one prompt or several.

Protocol: https://platform.openai.com/docs/api-reference/completions.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.choices import ChoiceSampling, StreamUsage
from serve_app.protocol.fields import Integer, no_unicode
from serve_app.protocol.response import ResponseMetadata, TokenNames, finite, usage
from serve_app.protocol.text import TextDelta, TokenScore

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 256
"""Answers to all prompts together."""

Prompt = str | list[int]


class CompletionRequest(ChoiceSampling):
    """`POST /v1/completions`. `prompts` is the field `prompt`, always as a list."""

    prompts: list[Any] = Field(alias="prompt")
    echo: bool = False
    """Puts the prompt's text before the answer's."""
    logprobs: Integer | None = Field(default=None, ge=0, le=20)

    @property
    def num_logprobs(self) -> int | None:
        """Log probabilities that the engine returns with each token, see `SamplingParams`."""
        return 0 if self.logprobs is None and self.best_of else self.logprobs

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
        return [_text(each) if isinstance(each, str) else list(map(int, each)) for each in prompts]

    @model_validator(mode="after")
    def _few_answers(self) -> "CompletionRequest":
        if self.num_answers * len(self.prompts) > MAX_PROMPTS:
            raise InvalidRequest(
                f"`n` (or `best_of`) times the number of prompts may be {MAX_PROMPTS} at most.",
                param="best_of" if self.is_ranked else "n",
            )
        return self

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "`echo` with `logprobs` is not supported: only answers have log probabilities.",
                param="echo",
            )
        return self


class CompletionResponse:
    """Makes the response to one request: the whole body, or its chunks.

    `echoes` has the text that goes before the answers to each prompt. With `n` choices to each
    prompt, choice `index` answers prompt `index // n`.
    """

    def __init__(
        self,
        request: CompletionRequest,
        metadata: ResponseMetadata,
        num_prompt_tokens: Sequence[int],
        echoes: Sequence[str],
        names: TokenNames,
    ) -> None:
        """`num_prompt_tokens` has the number of each prompt."""
        self._request, self._names = request, names
        self._num_prompt_tokens = num_prompt_tokens
        self._echoes = [echo for echo in echoes for _ in range(request.n)]
        self._totals = StreamUsage(sum(num_prompt_tokens), len(self._echoes))
        self._fields: JsonObject = {
            "id": f"cmpl-{metadata.id}",
            "object": "text_completion",
            "created": metadata.created,
            "model": metadata.model,
        }

    def body(self, wholes: Sequence[TextDelta]) -> JsonObject:
        """All answers that were generated, in the order of the prompts, as one object."""
        totals = usage(sum(self._num_prompt_tokens), sum(whole.num_tokens for whole in wholes))
        chosen = self._request.chosen(wholes)
        choices = [self._choice(index, whole) for index, whole in enumerate(chosen)]
        return {**self._fields, "choices": choices, "usage": totals}

    def chunks(self, index: int, delta: TextDelta) -> list[JsonObject]:
        """The chunks for a delta of choice `index`.

        With `include_usage` the usage of all choices follows the end of the last one; with
        `continuous_usage_stats` each chunk has the usage of its own choice so far.
        """
        chunks = []
        extra: JsonObject = {"usage": None} if self._request.include_usage else {}
        if self._request.include_continuous_usage:
            num_prompt_tokens = self._num_prompt_tokens[index // self._request.n]
            extra = {"usage": usage(num_prompt_tokens, delta.num_tokens)}
        if delta.text or delta.scores or delta.finish_reason or self._echoes[index]:
            choice = self._choice(index, delta)
            self._echoes[index] = ""
            chunks.append({**self._fields, "choices": [choice], **extra})
        if delta.finish_reason is not None:
            totals = self._totals.ended(delta.num_tokens)
            if extra and totals is not None:
                chunks.append({**self._fields, "choices": [], "usage": totals})
        return chunks

    def _choice(self, index: int, delta: TextDelta) -> JsonObject:
        logprobs = None
        if self._request.logprobs is not None and (delta.scores or delta.finish_reason):
            logprobs = _logprobs(delta.scores, self._request.logprobs, self._names)
        return {
            "index": index,
            "text": self._echoes[index] + delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
        }


def _logprobs(scores: list[TokenScore], num_top: int, names: TokenNames) -> JsonObject:
    def name(token_id: int) -> str:
        raw = names.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            # OpenAI's spelling of an incomplete character.
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def top(score: TokenScore) -> dict[str, float]:
        pairs = (*score.top[:num_top], (score.token_id, score.logprob))
        return {name(token_id): finite(logprob) for token_id, logprob in pairs}

    return {
        "tokens": [name(score.token_id) for score in scores],
        "token_logprobs": [finite(score.logprob) for score in scores],
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
