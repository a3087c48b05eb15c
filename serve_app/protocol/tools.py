"""Tools that a model may call, independent of the API.

A route converts its request to `Tools` with `check`, the answer's text to `ToolCallDelta`s with
`tool_calls.ToolCallParser`, and these to its own response.
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_errors import printable

MAX_TOOLS = 128
_NAME = re.compile("[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, slots=True)
class Tool:
    """One function of the client."""

    name: str
    description: str
    parameters: dict[str, Any]
    """The JSON schema of the arguments from the client; empty for a tool without arguments."""
    field: str
    """The request field of `parameters`, for errors."""
    is_strict: bool = False
    """Whether arguments must match the schema exactly even if the call is optional."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The mode of tool calls, and the allowed tools."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: frozenset[str] | None = None
    """The tools that may be called; None means all."""
    is_single: bool = False
    """Whether there is at most one call."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request, and how the model may use them."""

    tools: tuple[Tool, ...]
    choice: ToolChoice

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        if self.choice.mode == "none":
            return []
        names = self.choice.names
        return [tool for tool in self.tools if names is None or tool.name in names]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in a conversation or an answer."""

    id: str
    name: str
    arguments: str
    """The arguments as JSON text, unchanged from the model."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a call. The first piece of each call has its id and name, and no arguments."""

    index: int
    """The position of the call in the answer."""
    arguments: str = ""
    id: str | None = None
    name: str | None = None


def new_id() -> str:
    """Returns a new id for a call."""
    return f"call_{secrets.token_hex(12)}"


def joined(deltas: Iterable[ToolCallDelta]) -> list[ToolCall]:
    """Returns the calls that consist of the pieces `deltas`."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.id is not None and delta.name is not None:
            calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            last = calls[delta.index]
            calls[delta.index] = ToolCall(last.id, last.name, last.arguments + delta.arguments)
    return calls


def check(tools: Sequence[Tool], choice: ToolChoice, *, tools_field: str = "tools") -> Tools | None:
    """Returns the tools of a request after the checks of every API; None if there are none.

    Raises `InvalidRequest` for too many tools, an invalid or duplicate name, a schema that is not a
    schema of an object, and a choice of an unknown tool.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"`{tools_field}` takes up to {MAX_TOOLS} tools.", param=tools_field)
    names = [tool.name for tool in tools]
    for index, tool in enumerate(tools):
        if not _NAME.fullmatch(tool.name):
            raise InvalidRequest(
                f"The name of `{tools_field}.{index}` should have 1 to 128 letters, digits, "
                "underscores and hyphens.",
                param=f"{tools_field}.{index}",
            )
        if tool.name in names[:index]:
            raise InvalidRequest(
                f"Two tools have the name `{tool.name}`.", param=f"{tools_field}.{index}"
            )
        if tool.parameters.get("type", "object") != "object":
            raise InvalidRequest(
                f"`{tool.field}` should be the JSON schema of an object.", param=tool.field
            )
    if unknown := (choice.names or frozenset()) - set(names):
        name = printable(min(unknown))
        raise InvalidRequest(
            f"`tool_choice` names `{name}`, which is not one of `{tools_field}`.",
            param="tool_choice",
        )
    if choice.mode == "required" and not (names if choice.names is None else choice.names):
        raise InvalidRequest(
            f"`tool_choice` asks for a call, which needs `{tools_field}`.", param="tool_choice"
        )
    return Tools(tuple(tools), choice) if tools else None
