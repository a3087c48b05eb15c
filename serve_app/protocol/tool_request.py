"""The request fields of `/v1/chat/completions` for tools, in OpenAI's shape.

Protocol: https://platform.openai.com/docs/guides/function-calling.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_types import JsonMap, Text
from serve_app.protocol.tools import Tool, ToolChoice, Tools, check


class _Strict(BaseModel):
    # Keys that have no meaning here are ignored, as in messages: clients keep their own data there.
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class FunctionDefinition(_Strict):
    """One function: its name, what it does, and the JSON schema of its arguments."""

    name: Text
    description: Text | None = None
    parameters: JsonMap | None = None
    """The JSON schema of the arguments; None for a function without arguments."""
    strict: bool | None = None


class FunctionTool(_Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: FunctionDefinition


def offered(
    tools: list[FunctionTool], choice: ToolChoice | None, *, is_parallel: bool
) -> Tools | None:
    """Returns the tools of a request; None if it has none. Raises `InvalidRequest`."""
    read = [
        Tool(
            tool.function.name,
            tool.function.description or "",
            tool.function.parameters or {},
            f"tools.{index}.function.parameters",
            tool.function.strict is True,
        )
        for index, tool in enumerate(tools)
    ]
    choice = choice or ToolChoice()
    return check(read, choice if is_parallel else replace(choice, is_single=True))


def _read_choice(value: Any) -> ToolChoice:
    """Returns the value of `tool_choice`: a mode, one function, or a list of allowed functions.

    Raises `InvalidRequest`.
    """
    match value:
        case "auto" | "none" | "required":
            return ToolChoice(value)
        case "any":  # Mistral's word
            return ToolChoice("required")
        case {"type": "function", "function": {"name": str(name)}}:
            return ToolChoice("required", frozenset({name}), is_single=True)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(listed)},
        } if listed:
            return ToolChoice(mode, frozenset(_name(tool) for tool in listed))
    raise _bad_choice()


def _name(tool: Any) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    raise _bad_choice()


def _bad_choice() -> InvalidRequest:
    return InvalidRequest(
        "`tool_choice` should be `auto`, `none`, `required`, "
        '{"type": "function", "function": {"name": ...}}, or allowed tools in OpenAI\'s form.',
        param="tool_choice",
    )


Choice = Annotated[ToolChoice, BeforeValidator(_read_choice)]
"""The type of the field `tool_choice`."""
