"""The request of `/v1/responses`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.field_errors import sentence
from serve_app.protocol.field_types import InnerObject, Integer, Text
from serve_app.protocol.fields import AdaptedSampling, Body
from serve_app.protocol.grammar_source import GrammarSource, schema_source
from serve_app.protocol.messages import Message
from serve_app.protocol.responses_api import unsupported
from serve_app.protocol.responses_api.items import Items, conversation
from serve_app.protocol.responses_api.tools import OfferedTool, offered
from serve_app.protocol.tools import MAX_TOOLS, Tools

LOGPROBS = "message.output_text.logprobs"


class TextFormat(InnerObject):
    """`text.format`. Every schema is enforced exactly, even without `strict`."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @property
    def source(self) -> GrammarSource | None:
        """The grammar; None for text. Raises `InvalidRequest`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return schema_source({"type": "object"}, "text.format")
        if self.schema_ is None:
            raise InvalidRequest(
                "`text.format.schema` is required with the type `json_schema`.",
                param="text.format.schema",
            )
        return schema_source(self.schema_, "text.format.schema")


class TextConfig(InnerObject):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Text | None = None

    @field_validator("verbosity")
    @classmethod
    def _is_medium(cls, value: str | None) -> str | None:
        if value not in (None, "medium"):
            raise sentence("`text.verbosity` can only be `medium`: ask for it in words.")
        return value


class StreamOptions(InnerObject):
    include_obfuscation: bool | None = None
    """Accepted and not used: events are not padded."""


class ResponsesRequest(Body):
    """`POST /v1/responses`. Without `max_output_tokens` the answer may fill the context."""

    IGNORED = unsupported.IGNORED
    UNSUPPORTED = unsupported.UNSUPPORTED

    input: Items
    instructions: Text | None = None
    max_output_tokens: Integer | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    ignore_eos: bool = False
    """vLLM's field, which load generators send."""
    text: TextConfig = TextConfig()
    tools: list[OfferedTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    metadata: dict[Text, Text] = Field(default_factory=dict)
    """Returned in the response."""
    include: list[Text] = Field(default_factory=list)
    """Additional contents of the response; only log probabilities are supported."""
    top_logprobs: Integer = Field(default=0, ge=0, le=20)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _candidates_need_logprobs(self) -> "ResponsesRequest":
        if self.top_logprobs and self.num_logprobs is None:
            raise InvalidRequest(
                f'`top_logprobs` needs `include: ["{LOGPROBS}"]`.', param="top_logprobs"
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Number of log probabilities per token, see `SamplingParams`."""
        return self.top_logprobs if LOGPROBS in self.include else None

    @property
    def conversation(self) -> list[Message]:
        """The prompt as chat messages."""
        return conversation(self.instructions, self.input)

    def offered_tools(self) -> Tools | None:
        """Returns the tools that the answer may call. Raises `InvalidRequest`."""
        return offered(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls)

    @property
    def sampling(self) -> AdaptedSampling:
        """The sampling fields of the request."""
        fields: JsonObject = {
            name: getattr(self, name)
            for name in ("temperature", "top_p")
            if name in self.model_fields_set
        }
        fields |= {"max_tokens": self.max_output_tokens, "limit_field": "max_output_tokens"}
        fields["ignore_eos"] = self.ignore_eos
        if self.text.format is not None:
            fields["source"] = self.text.format.source
        return AdaptedSampling.model_validate(fields)
