"""The fields `tools` and `tool_choice` of the Responses API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_errors import printable, sentence
from serve_app.protocol.field_types import JsonMap, Text
from serve_app.protocol.tools import Tool, ToolChoice, Tools, check


class FunctionTool(BaseModel):
    """A function of the client. Other keys are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["function"]
    name: Text
    description: Text | None = None
    parameters: JsonMap | None = None
    strict: bool | None = None


def _a_function(tool: Any) -> Any:
    match tool:
        case {"type": str(kind)} if kind != "function":
            raise sentence(
                f"Tools of type `{printable(kind)}` are not supported: send functions.", "type"
            )
    return tool


OfferedTool = Annotated[FunctionTool, BeforeValidator(_a_function)]
"""One of the field `tools`."""


def offered(tools: list[FunctionTool], choice: Any, *, is_parallel: bool) -> Tools | None:
    """Returns the tools of a request; None if it has none.

    `choice` is the value of `tool_choice`. Raises `InvalidRequest`.
    """
    read = [
        Tool(
            tool.name,
            tool.description or "",
            tool.parameters or {},
            f"tools.{index}.parameters",
            tool.strict is True,
        )
        for index, tool in enumerate(tools)
    ]
    mode, names = _read_choice(choice)
    is_single = not is_parallel or (isinstance(choice, dict) and choice["type"] == "function")
    return check(read, ToolChoice(mode, names, is_single))


def _read_choice(
    value: Any,
) -> tuple[Literal["auto", "none", "required"], frozenset[str] | None]:
    """Returns the mode, and the names of the tools that may be called. Raises `InvalidRequest`."""
    match value:
        case "auto" | "none" | "required":
            return value, None
        case {"type": "function", "name": str(name)}:
            return "required", frozenset({name})
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*listed]} if (
            listed
        ):
            return mode, frozenset(_name(tool) for tool in listed)
    raise _bad_choice()


def _name(tool: Any) -> str:
    match tool:
        case {"type": "function", "name": str(name)}:
            return name
    raise _bad_choice()


def _bad_choice() -> InvalidRequest:
    return InvalidRequest(
        '`tool_choice` should be `auto`, `none`, `required`, {"type": "function", "name": ...}, or '
        "allowed functions in OpenAI's form.",
        param="tool_choice",
    )
