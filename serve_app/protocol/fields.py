"""Request bodies: how every body is validated, and the sampling fields that several routes take.

Field names and defaults are OpenAI's, and vLLM's for fields that OpenAI does not have. Every field
of a request is used, ignored (`IGNORED`) or refused by name.
"""

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.errors import InvalidRequest
from serve_app.protocol.values import is_json

IGNORED = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that are accepted and not used: they do not change the answer."""

UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "there is no audio"),
    "best_of": ((1,), "one answer is generated for each prompt"),
    "function_call": (("none",), "tool calls are not supported"),
    "functions": (([],), "tool calls are not supported"),
    "modalities": ((["text"],), "answers are text"),
    "n": ((1,), "one answer is generated for each prompt; send the request again for another"),
    "parallel_tool_calls": ((), "tool calls are not supported"),
    "prediction": ((), "predicted outputs are not supported"),
    "reasoning_effort": ((), "this model does not reason separately"),
    "response_format": (({"type": "text"},), "answers are plain text"),
    "suffix": (("",), "text is continued at its end only"),
    "tool_choice": (("none",), "tool calls are not supported"),
    "tools": (([],), "tool calls are not supported"),
    "verbosity": ((), "ask for a short answer in words"),
    "web_search_options": ((), "there is no web search"),
}
"""OpenAI's fields that are refused, each with the values that pass, because they ask for what
happens without the field, and the reason for the refusal."""

MAX_STOP_CHARS = 500
MAX_BIASES = 1024

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")
_SENTENCE = "sentence"

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A request body. Unknown fields and wrong types are refused; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    model: str | None = None
    """A served name; None means the first one."""

    @classmethod
    def read(cls: type[B], body: Any) -> B:
        """Validates a parsed JSON value; raises `InvalidRequest` naming the first bad field."""
        return cls.of(used_fields(body))

    @classmethod
    def of(cls: type[B], fields: dict[str, Any]) -> B:
        """Validates the result of `used_fields`; raises the same errors as `read`."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _first_error(error) from None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool = False
    """Adds a last chunk with the usage and no choices."""
    include_obfuscation: bool = False
    """Accepted and not used: chunks are not padded."""


class Sampling(Body):
    """The sampling fields, which are the same on every route that generates text."""

    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=-1)
    """0 and -1 keep all tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Token id, as a JSON string, to a bias from -100 to 100."""
    stop: tuple[str, ...] = ()
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> tuple[int | None, str]:
        """The maximum number of tokens to generate, and the name of the field that has it."""
        return self.max_tokens, "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """n: log probabilities of the chosen token and of the n most probable ones. None: none."""
        return None

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise InvalidRequest("`stop` should be a string or a list of strings.", param="stop")
        if len(stops) > 16 or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise InvalidRequest(
                f"`stop` takes up to 16 strings of 1 to {MAX_STOP_CHARS} characters.", param="stop"
            )
        return tuple(stops)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few_biases(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_BIASES:
            raise InvalidRequest(
                f"`logit_bias` takes up to {MAX_BIASES} tokens.", param="logit_bias"
            )
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias_of_tokens(cls, value: dict[str, float]) -> dict[str, float]:
        # The comparison is false for NaN.
        if not all(
            _TOKEN_ID.fullmatch(token) and abs(bias) <= 100 for token, bias in value.items()
        ):
            raise InvalidRequest(
                "`logit_bias` maps token ids to numbers from -100 to 100.", param="logit_bias"
            )
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
        limit, field = self.limit
        if limit is not None and self.min_tokens > limit:
            raise InvalidRequest(
                f"`min_tokens` should not be larger than `{field}`.", param="min_tokens"
            )
        return self


def used_fields(body: Any) -> dict[str, Any]:
    """The fields of a parsed body that matter for the answer; their values are not validated.

    Raises `InvalidRequest` for a body that is no object, a field that is not supported, and a value
    that JSON in UTF-8 cannot hold.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    used = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name not in UNSUPPORTED:
            used[name] = value
            continue
        neutral, reason = UNSUPPORTED[name]
        # The types must be equal too: True == 1, but `"n": true` is an error.
        if not any(type(value) is type(each) and value == each for each in neutral):
            raise InvalidRequest(f"`{name}` is not supported: {reason}.", param=name)
    if is_json(used):
        return used
    field = next(printable(name) for name, value in used.items() if not is_json([name, value]))
    raise InvalidRequest(
        f"`{field}` holds something that is not JSON in UTF-8: NaN, Infinity, or a lone surrogate.",
        param=field,
    )


def printable(name: Any) -> str:
    """A client's own text, cut to 64 characters and safe to put into an error."""
    return str(name)[:64].encode("utf-8", "replace").decode()


def sentence(message: str, field: str | None = None) -> PydanticCustomError:
    """An error for validators of nested values, which do not know their path in the body.

    The client gets `message` unchanged. `param` is the path of the validated value, plus `field`.
    """
    context = None if field is None else {"field": field}
    return PydanticCustomError(_SENTENCE, message, context)


def _first_error(error: ValidationError) -> InvalidRequest:
    """Pydantic's first error as one sentence that starts with the field."""
    first = error.errors(include_url=False, include_input=False)[0]
    inner = first.get("ctx", {}).get("field")
    path = [*first["loc"], *([inner] if first["type"] == _SENTENCE and inner else [])]
    field = printable(".".join(str(part) for part in path))
    if first["type"] == _SENTENCE:
        return InvalidRequest(first["msg"], param=field)
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"`{field}` is not a field of this request.", param=field)
    if first["type"] == "missing":
        return InvalidRequest(f"`{field}` is required.", param=field)
    message = first["msg"].removeprefix("Input ").rstrip(".")
    return InvalidRequest(f"`{field}` {message[:1].lower()}{message[1:]}.", param=field)
