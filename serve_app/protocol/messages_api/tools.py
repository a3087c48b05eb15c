"""The fields `tools` and `tool_choice` of the Messages API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_errors import printable, sentence
from serve_app.protocol.field_types import JsonMap, Text
from serve_app.protocol.tools import Tool, ToolChoice, Tools, check


class ToolDefinition(BaseModel):
    """A tool of the client. Other keys, such as `cache_control`, are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["custom"] | None = None
    name: Text
    description: Text | None = None
    input_schema: JsonMap
    strict: bool | None = None


def _of_the_client(tool: Any) -> Any:
    match tool:
        case {"type": str(kind)} if kind != "custom":
            raise sentence(
                f"Tools of type `{printable(kind)}` are not supported: send the name and the "
                "`input_schema` of a tool of your own.",
                "type",
            )
    return tool


OfferedTool = Annotated[ToolDefinition, BeforeValidator(_of_the_client)]
"""One of the field `tools`."""


def offered(tools: list[ToolDefinition], choice: ToolChoice) -> Tools | None:
    """Returns the tools of a request; None if it has none. Raises `InvalidRequest`."""
    read = [
        Tool(
            tool.name,
            tool.description or "",
            tool.input_schema,
            f"tools.{index}.input_schema",
            tool.strict is True,
        )
        for index, tool in enumerate(tools)
    ]
    return check(read, choice)


def _read_choice(value: Any) -> ToolChoice:
    """Returns the value of `tool_choice`. Raises `InvalidRequest`."""
    match value:
        case {"type": "tool", "name": str(name)}:
            return ToolChoice("required", frozenset({name}), is_single=True)
        case {"type": "auto" | "any" | "none" as kind}:
            single = value.get("disable_parallel_tool_use")
            if single is None or isinstance(single, bool):
                return ToolChoice("required" if kind == "any" else kind, is_single=single is True)
    raise InvalidRequest(
        '`tool_choice` should have the type `auto`, `any` or `none`, or be {"type": "tool", '
        '"name": ...}; `disable_parallel_tool_use` is true or false.',
        param="tool_choice",
    )


Choice = Annotated[ToolChoice, BeforeValidator(_read_choice)]
"""The type of the field `tool_choice`."""
