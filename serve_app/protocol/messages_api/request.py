"""The requests of `/v1/messages` and `/v1/messages/count_tokens`."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_types import InnerObject, Integer, JsonMap, Text
from serve_app.protocol.fields import MAX_STOP_CHARS, AdaptedSampling, Body
from serve_app.protocol.grammar_source import GrammarSource, schema_source
from serve_app.protocol.messages import Message
from serve_app.protocol.messages_api import unsupported
from serve_app.protocol.messages_api.content import Messages, System, conversation, joined
from serve_app.protocol.messages_api.tools import Choice, OfferedTool, offered
from serve_app.protocol.tools import MAX_TOOLS, ToolChoice, Tools


class OutputFormat(InnerObject):
    """`output_config.format`: the JSON schema that the answer must match."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(InnerObject):
    """`output_config`. The effort is accepted and has no effect."""

    effort: Text | None = None
    format: OutputFormat | None = None


class ContextManagement(InnerObject):
    """`context_management`. Only clearing thoughts is accepted; the prompt never contains them."""

    edits: list[dict[str, Any]] = Field(default_factory=list)


class CountTokensRequest(Body):
    """`POST /v1/messages/count_tokens`: the fields that make up the prompt."""

    IGNORED = unsupported.IGNORED
    UNSUPPORTED = unsupported.UNSUPPORTED

    messages: Messages
    system: System = Field(default_factory=list)
    tools: list[OfferedTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Choice = ToolChoice()
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    thinking: JsonMap | None = None
    """The types `disabled` and `adaptive`, which let the model answer without thoughts."""

    @field_validator("thinking")
    @classmethod
    def _no_thoughts(cls, value: dict[str, Any] | None) -> None:
        if value is not None and value.get("type") not in ("disabled", "adaptive"):
            raise InvalidRequest(
                "`thinking` is not supported: this model does not think before it answers; send "
                "the type `disabled` or leave it out.",
                param="thinking",
            )

    @field_validator("context_management")
    @classmethod
    def _only_thoughts(cls, value: ContextManagement | None) -> ContextManagement | None:
        for edit in value.edits if value is not None else ():
            if not str(edit.get("type")).startswith("clear_thinking"):
                raise InvalidRequest(
                    "`context_management` can only clear thoughts: the server leaves messages as "
                    "they are.",
                    param="context_management.edits",
                )
        return value

    @model_validator(mode="after")
    def _asks_something(self) -> "CountTokensRequest":
        if not any(message.role == "user" for message in self.messages):
            raise InvalidRequest(
                "`messages` should have at least one message of the role user.", param="messages"
            )
        if self.continues and not joined(self.messages[-1].content).strip():
            raise InvalidRequest(
                "The last of the `messages` is the assistant's and is continued: it should not be "
                "empty.",
                param="messages",
            )
        return self

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message, which is the assistant's."""
        return self.messages[-1].role == "assistant"

    @property
    def conversation(self) -> list[Message]:
        """The prompt as chat messages."""
        return conversation(self.system, self.messages)

    def offered_tools(self) -> Tools | None:
        """Returns the tools that the answer may call. Raises `InvalidRequest`."""
        return offered(self.tools, self.tool_choice)


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`."""

    max_tokens: Integer = Field(ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(default=1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: Integer = Field(default=0, ge=0)
    stop_sequences: list[Text] = Field(default_factory=list)
    stream: bool = False

    @field_validator("stop_sequences")
    @classmethod
    def _few_and_short(cls, value: list[str]) -> list[str]:
        if len(value) > 16 or not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in value):
            raise InvalidRequest(
                f"`stop_sequences` takes up to 16 strings of 1 to {MAX_STOP_CHARS} characters.",
                param="stop_sequences",
            )
        return value

    @property
    def sampling(self) -> AdaptedSampling:
        """The sampling fields of the request."""
        names = ("max_tokens", "temperature", "top_p", "top_k")
        fields = {name: getattr(self, name) for name in names if name in self.model_fields_set}
        return AdaptedSampling.model_validate(
            {**fields, "stop": self.stop_sequences, "source": self._source}
        )

    @property
    def _source(self) -> GrammarSource | None:
        if self.output_config is None or self.output_config.format is None:
            return None
        return schema_source(self.output_config.format.schema_, "output_config.format.schema")
