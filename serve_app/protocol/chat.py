"""OpenAI's chat completions: the request, the response, and the chunks of a streamed response.

Protocol: https://platform.openai.com/docs/api-reference/chat.
"""

from collections.abc import Sequence

from pydantic import Field, ValidationInfo, field_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.choices import ChoiceSampling, StreamUsage
from serve_app.protocol.echo import prompt_logprobs
from serve_app.protocol.field_types import Integer
from serve_app.protocol.fields import check_min_tokens
from serve_app.protocol.messages import Conversation
from serve_app.protocol.response import ResponseMetadata, TokenNames, detailed_usage
from serve_app.protocol.scores import TokenScore, named, pieces
from serve_app.protocol.text import TextDelta
from serve_app.protocol.tool_request import Choice, FunctionTool, offered
from serve_app.protocol.tools import ToolCallDelta, Tools, joined


class ChatRequest(ChoiceSampling):
    """`POST /v1/chat/completions`. Without `max_tokens` the answer may fill the context."""

    messages: Conversation
    max_completion_tokens: Integer | None = Field(default=None, ge=1)
    """OpenAI's newer name of `max_tokens`."""
    logprobs: bool = False
    top_logprobs: Integer = Field(default=0, ge=0, le=20)
    prompt_logprobs: Integer | None = Field(default=None, ge=0, le=20)
    """Adds the log probabilities of the prompt's tokens (vLLM's field)."""
    continue_final_message: bool = False
    """Whether the answer continues the text of the last message (vLLM's field)."""
    add_generation_prompt: bool = True
    """Whether the prompt ends with the template's beginning of an answer, if it has one (vLLM's
    field)."""
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: Choice | None = None
    """None means `auto`."""
    parallel_tool_calls: bool = True
    """Whether one answer may have several calls."""

    @property
    def num_logprobs(self) -> int | None:
        """Number of log probabilities per token, see `SamplingParams`."""
        if self.logprobs:
            return self.top_logprobs
        return 0 if self.best_of else None

    @property
    def limit(self) -> tuple[int | None, str]:
        if self.max_completion_tokens is None:
            return self.max_tokens, "max_tokens"
        return self.max_completion_tokens, "max_completion_tokens"

    def offered_tools(self) -> Tools | None:
        """Returns the tools that the answer may call. Raises `InvalidRequest`."""
        return offered(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)

    @field_validator("max_completion_tokens")
    @classmethod
    def _is_the_only_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("max_tokens") not in (None, value):
            raise InvalidRequest(
                "`max_tokens` and `max_completion_tokens` are one limit; send one of them.",
                param="max_completion_tokens",
            )
        check_min_tokens(info.data.get("min_tokens", 0), value, "max_completion_tokens")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int, info: ValidationInfo) -> int:
        if value and not info.data.get("logprobs", True):
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _cannot_be_streamed(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise InvalidRequest("`prompt_logprobs` cannot be streamed.", param="prompt_logprobs")
        return value

    @field_validator("add_generation_prompt")
    @classmethod
    def _is_no_continuation(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("continue_final_message"):
            raise InvalidRequest(
                "`continue_final_message` needs `add_generation_prompt: false`.",
                param="continue_final_message",
            )
        return value


def body(
    request: ChatRequest,
    metadata: ResponseMetadata,
    num_prompt_tokens: int,
    names: TokenNames,
    wholes: Sequence[TextDelta],
) -> JsonObject:
    """Returns all answers that were generated as one `chat.completion` object with `n` choices."""
    extra: JsonObject = {}
    if (num_top := request.prompt_logprobs) is not None:
        extra["prompt_logprobs"] = prompt_logprobs(wholes[0], num_top, names)
    return {
        "id": f"chatcmpl-{metadata.id}",
        "object": "chat.completion",
        "created": metadata.created,
        "model": metadata.model,
        "system_fingerprint": metadata.fingerprint,
        "choices": [
            _choice(request, index, whole, names)
            for index, whole in enumerate(request.chosen(wholes))
        ],
        "usage": request.usage(num_prompt_tokens, wholes),
        **extra,
    }


def _choice(request: ChatRequest, index: int, whole: TextDelta, names: TokenNames) -> JsonObject:
    message: JsonObject = {"role": "assistant", "content": whole.text, "refusal": None}
    if whole.tool_calls:
        message |= _calls(whole)
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(request, whole.scores, names) if request.logprobs else None,
        "finish_reason": whole.finish_reason,
    }


def _calls(whole: TextDelta) -> JsonObject:
    """Returns the fields of a message with calls."""
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in joined(whole.tool_calls)
    ]
    return {"content": whole.text or None, "tool_calls": calls}


class ChatChunks:
    """Creates the `chat.completion.chunk` objects of one choice, delta by delta.

    The first chunk has the role, further chunks have text and tool calls, and the last chunk has
    the finish reason. With `include_usage`, the last choice ends with one more chunk that has the
    usage. With `continuous_usage_stats`, each chunk has the usage of its own choice so far.
    """

    def __init__(
        self,
        request: ChatRequest,
        metadata: ResponseMetadata,
        num_prompt_tokens: int,
        names: TokenNames,
        totals: StreamUsage,
        index: int = 0,
    ) -> None:
        """`totals` counts the tokens of all choices; `index` is the index of this one."""
        self._request, self._names = request, names
        self._totals, self._index = totals, index
        self._num_prompt_tokens = num_prompt_tokens
        self._has_begun = False
        usage = request.stream_options
        self._is_usage_continuous = usage.include_usage and usage.continuous_usage_stats
        self._fields: JsonObject = {
            "id": f"chatcmpl-{metadata.id}",
            "object": "chat.completion.chunk",
            "created": metadata.created,
            "model": metadata.model,
            "system_fingerprint": metadata.fingerprint,
        }
        if usage.include_usage:
            self._fields["usage"] = None

    def __call__(self, delta: TextDelta) -> list[JsonObject]:
        """Returns the chunks for `delta`; none if it adds nothing."""
        chunks = []
        if self._is_usage_continuous:
            # The first chunk, with the role, is sent before any token (as in vLLM).
            num_tokens = delta.num_tokens if self._has_begun else 0
            counts = self._num_prompt_tokens, num_tokens, delta.num_cached_tokens
            self._fields["usage"] = detailed_usage(*counts)
        if not self._has_begun:
            chunks.append(self._chunk({"role": "assistant", "content": ""}))
            self._has_begun = True
        if self._request.logprobs and delta.scores:
            text = delta.text
            for scores in pieces(iter(delta.scores)):
                logprobs = _logprobs(self._request, scores, self._names)
                chunks.append(self._chunk({"content": text}, logprobs))
                text = ""
        elif delta.text:
            chunks.append(self._chunk({"content": delta.text}))
        for piece in delta.tool_calls:
            chunks.append(self._chunk({"tool_calls": [_call_delta(piece)]}))
        if delta.finish_reason is not None:
            chunks.append(self._chunk({}, None, delta.finish_reason))
            totals = self._totals.ended(delta, is_first=self._index == 0)
            if totals is not None and self._request.stream_options.include_usage:
                chunks.append({**self._fields, "choices": [], "usage": totals})
        return chunks

    def _chunk(
        self,
        message: JsonObject,
        logprobs: JsonObject | None = None,
        finish_reason: str | None = None,
    ) -> JsonObject:
        choice = {
            "index": self._index,
            "delta": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self._fields, "choices": [choice]}


def _call_delta(piece: ToolCallDelta) -> JsonObject:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"index": piece.index, "id": piece.id, "type": "function", "function": function}


def _logprobs(request: ChatRequest, scores: list[TokenScore], names: TokenNames) -> JsonObject:
    return {"content": named(scores, request.top_logprobs, names), "refusal": None}
