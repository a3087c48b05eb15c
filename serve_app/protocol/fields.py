"""Request bodies: the validation of every body, and the sampling fields of several routes.

Field names and defaults are OpenAI's, and vLLM's for fields that OpenAI does not have. Every field
of a request is used, ignored (`Body.IGNORED`) or refused by name.
"""

import re
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_errors import first_error
from serve_app.protocol.field_types import InnerObject, Integer, Text
from serve_app.protocol.grammar_source import GrammarSource, ResponseFormat, StructuredOutputs
from serve_app.protocol.unsupported import (
    IGNORED,
    UNSUPPORTED,
    Unsupported,
    check_is_neutral,
)

MAX_STOP_CHARS = 500
MAX_BIASES = 1024

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,8}")


class Body(BaseModel):
    """A request body. Unknown fields and wrong types are refused; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    IGNORED: ClassVar[frozenset[str]] = IGNORED
    UNSUPPORTED: ClassVar[Unsupported] = UNSUPPORTED
    """Fields of the route's API without effect: `IGNORED` are accepted with any value,
    `UNSUPPORTED` with some values."""

    model: Text | None = None
    """One of the served names. Default: the first one."""

    @classmethod
    def read(cls, body: Any) -> Self:
        """Validates a parsed JSON value. Raises `InvalidRequest` naming the first bad field."""
        if not isinstance(body, dict):
            raise InvalidRequest("The body must be a JSON object.")
        used = {}
        for name, value in body.items():
            if value is None or name in cls.IGNORED:
                continue
            if name in cls.model_fields or name not in cls.UNSUPPORTED:
                used[name] = value
            elif (reason := check_is_neutral(cls.UNSUPPORTED, name, value)) is not None:
                raise InvalidRequest(f"`{name}` is not supported: {reason}.", param=name)
        try:
            return cls.model_validate(used)
        except ValidationError as error:
            raise first_error(error, used) from None


class StreamOptions(InnerObject):
    include_usage: bool | None = None
    """Whether a last chunk has the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: whether every chunk has the usage so far (vLLM's field)."""
    include_obfuscation: bool | None = None
    """Accepted and not used: chunks are not padded."""


class Sampling(Body):
    """The sampling fields of every route that generates text.

    A validator of a field runs only if the request has the field. It sees only the fields declared
    above its own, so a rule for two fields belongs to the lower field.
    """

    OWN_DEFAULTS: ClassVar[frozenset[str]] = frozenset()
    """Fields that keep their default here even if the checkpoint has its own default."""

    max_tokens: Integer | None = Field(default=None, ge=1)
    min_tokens: Integer = Field(default=0, ge=0)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    """0 keeps the most probable token only."""
    top_k: Integer = Field(default=0, ge=-1)
    """0 and -1 keep all tokens."""
    min_p: float = Field(default=0.0, ge=0, le=1, allow_inf_nan=False)
    seed: Integer | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: dict[str, float] = Field(default_factory=dict)
    """Token id, as a JSON string, to a bias from -100 to 100."""
    stop: tuple[Text, ...] = ()
    stop_token_ids: list[Integer] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Integer = Field(default=0, ge=-1000, le=1000)
    """Waiting requests with a smaller number are computed first (as in vLLM)."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def grammar(self) -> GrammarSource | None:
        """The grammar that the answer must match; None if there is none. Raises
        `InvalidRequest`."""
        chosen = self.structured_outputs or self.response_format
        return None if chosen is None else chosen.source

    @property
    def limit(self) -> tuple[int | None, str]:
        """The maximum number of tokens to generate, and the name of its field."""
        return self.max_tokens, "max_tokens"

    @field_validator("min_tokens")
    @classmethod
    def _at_most_max_tokens(cls, value: int, info: ValidationInfo) -> int:
        check_min_tokens(value, info.data.get("max_tokens"), "max_tokens")
        return value

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

    @field_validator("stream_options")
    @classmethod
    def _usage_needs_stream(cls, value: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if value.include_usage and not info.data.get("stream", True):
            raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
        return value

    @field_validator("structured_outputs")
    @classmethod
    def _is_the_only_format(
        cls, value: StructuredOutputs | None, info: ValidationInfo
    ) -> StructuredOutputs | None:
        if value and info.data.get("response_format"):
            raise InvalidRequest(
                "Send `response_format` or `structured_outputs`, not both.",
                param="structured_outputs",
            )
        return value

    @field_validator("response_format")
    @classmethod
    def _text_is_no_format(cls, value: ResponseFormat | None) -> ResponseFormat | None:
        return None if value is not None and value.type == "text" else value

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


def check_min_tokens(min_tokens: int, limit: int | None, field: str) -> None:
    """Raises `InvalidRequest` if `min_tokens` exceeds the request's `limit`, its field `field`."""
    if limit is not None and min_tokens > limit:
        raise InvalidRequest(
            f"`min_tokens` should not be larger than `{field}`.", param="min_tokens"
        )


class AdaptedSampling(Sampling):
    """The sampling fields of another API's request, under OpenAI's names."""

    source: GrammarSource | None = None
    limit_field: str = "max_tokens"
    """The request's own name of `max_tokens`."""

    @property
    def grammar(self) -> GrammarSource | None:
        return self.source

    @property
    def limit(self) -> tuple[int | None, str]:
        return self.max_tokens, self.limit_field
