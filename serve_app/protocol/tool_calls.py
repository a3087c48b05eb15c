"""ToolCallParser: finds tool calls in the text of an answer while it is generated.

A model calls tools with `MARKER` and a JSON list: `[TOOL_CALLS] [{"name": "f", "arguments": {}}]`.
The text before the marker is content. If the list is not a call of a known tool, the marker and the
list are content too.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from serve_app.protocol.tools import ToolCallDelta, new_id

MARKER = "[TOOL_CALLS]"
"""The beginning of calls: a text, or Mistral's control token of that name."""
MAX_HEAD_CHARS = 500
"""Maximum number of characters between the marker or a call and the arguments of the next call."""

_SYNTAX = ("{", '"name"', ":", None, ",", '"arguments"', ":")
"""The syntax before the arguments, without spaces; None is the name as a JSON string."""
_NAME = re.compile('"([A-Za-z0-9_-]{0,128})"')
_NAME_BEGINS = re.compile(r'(?:"[A-Za-z0-9_-]{0,128})?\Z')
_BEGINNINGS = "|".join(re.escape(MARKER[:end]) for end in range(len(MARKER), 0, -1))
_HELD = re.compile(rf"\s*(?:{_BEGINNINGS})?\Z")
_STRUCTURE = re.compile(r'["\\{}\[\]]')


class _Incomplete(Exception):
    """The text may be the beginning of a call."""


class _NoCall(Exception):
    """The text is not a call."""


@dataclass(slots=True)
class Parsed:
    """The content and the pieces of calls that a text adds to an answer."""

    content: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class ToolCallParser:
    """Parses one answer. The result does not depend on the pieces in which its text arrives.

    Example with the tool `f` and the pieces `Hi [TOOL_`, `CALLS] [{"name": "f", `,
    `"arguments": {"a":`, ` 1}}` and `]`:

        push            adds                               `_step` after it, and `_held`
        1               content `Hi`                       `_text`, ` [TOOL_` may begin the marker
        2               nothing                            `_head`, which needs `"arguments":`
        3               call 0 of `f`, arguments `{"a":`   `_arguments`
        4               arguments ` 1}`                    `_tail`, `}`
        5               nothing                            `_content`
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names` are the names of the tools that may be called."""
        self._names = names
        self._step: Callable[[Parsed], None] = self._text
        """Parses the next part of `_held`. Raises `_Incomplete` if that needs more text."""
        self._held = ""
        """Text whose meaning is not known yet: spaces, or the beginning of the marker or of a
        call."""
        self._marker = ""
        """The marker and the spaces before it, after it is found."""
        self._num_calls = 0
        self._depth = 0
        """Number of open brackets in the arguments."""
        self._is_in_string = self._is_escaped = False

    @property
    def has_called(self) -> bool:
        """Whether the answer has a call, and its last call is complete."""
        return self._num_calls > 0 and self._step != self._arguments

    def push(self, text: str) -> Parsed:
        """Returns the content and calls that `text` adds to the answer."""
        parsed = Parsed()
        self._held += text
        try:
            while self._held:
                self._step(parsed)
        except _Incomplete:
            pass
        return parsed

    def end(self) -> Parsed:
        """Returns the withheld text at the end of the answer.

        The syntax around calls is dropped. A call that was cut before its arguments is dropped too,
        unless it is the first call, which becomes content.
        """
        rest, self._held = self._held, ""
        if self._step == self._head:
            return Parsed(self._marker + rest)
        return Parsed(rest if self._step == self._text else "")

    def _text(self, parsed: Parsed) -> None:
        """Searches for the marker. Spaces before the marker are not content."""
        at = self._held.find(MARKER)
        if at >= 0:
            content, end = self._held[:at].rstrip(), at + len(MARKER)
            parsed.content += content
            self._marker, self._held = self._held[len(content) : end], self._held[end:]
            self._step = self._head
            return
        match = _HELD.search(self._held)
        num_safe = match.start() if match else len(self._held)
        parsed.content += self._held[:num_safe]
        self._held = self._held[num_safe:]
        raise _Incomplete

    def _head(self, parsed: Parsed) -> None:
        """Reads up to the arguments of the first call."""
        try:
            self._begin_call(parsed, "[")
        except _NoCall:
            parsed.content += self._marker
            self._step = self._content

    def _tail(self, parsed: Parsed) -> None:
        """Reads from the end of a call's arguments to those of the next call, or to the end."""
        try:
            end = _skip(self._held, _after(self._held, "}"))
            if self._held[end : end + 1] == "]":
                self._held, self._step = self._held[end + 1 :], self._content
            else:
                self._begin_call(parsed, "}", ",")
        except _NoCall:
            self._step = self._content

    def _begin_call(self, parsed: Parsed, *before: str) -> None:
        """Reads `before` and up to the arguments. Raises `_Incomplete` and `_NoCall`."""
        end, name = _head_end(self._held, (*before, *_SYNTAX))
        if name not in self._names:
            raise _NoCall
        if not self._held[end:]:
            raise _Incomplete
        if self._held[end] != "{":
            raise _NoCall
        parsed.calls.append(ToolCallDelta(self._num_calls, id=new_id(), name=name))
        self._num_calls += 1
        self._held, self._step = self._held[end:], self._arguments

    def _arguments(self, parsed: Parsed) -> None:
        """Moves arguments from `_held` to a call, up to the bracket that closes them."""
        end = self._arguments_end()
        parsed.calls.append(ToolCallDelta(self._num_calls - 1, self._held[:end]))
        self._held = self._held[end:]

    def _arguments_end(self) -> int:
        at = 0
        if self._is_escaped:
            self._is_escaped, at = False, 1
        while match := _STRUCTURE.search(self._held, at):
            at, char = match.end(), match[0]
            if char == "\\":
                self._is_escaped = at == len(self._held)
                at += 1
            elif char == '"':
                self._is_in_string = not self._is_in_string
            elif not self._is_in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    self._step = self._tail
                    return at
        return len(self._held)

    def _content(self, parsed: Parsed) -> None:
        """Treats all text as content."""
        parsed.content += self._held
        self._held = ""


def _head_end(text: str, syntax: tuple[str | None, ...]) -> tuple[int, str]:
    """Returns the position after `syntax` and spaces, and the name in it."""
    at, name = 0, ""
    for part in syntax:
        at = _skip(text, at)
        if part is not None:
            at = _after(text, part, at)
        elif match := _NAME.match(text, at):
            at, name = match.end(), match[1]
        elif _NAME_BEGINS.match(text, at):
            raise _Incomplete
        else:
            raise _NoCall
    return _skip(text, at), name


def _after(text: str, part: str, at: int = 0) -> int:
    """Returns the position in `text` after spaces and `part`."""
    at = _skip(text, at)
    if not text.startswith(part, at):
        raise _Incomplete if part.startswith(text[at:]) else _NoCall
    return at + len(part)


def _skip(text: str, at: int) -> int:
    """Returns the first position from `at` on that is not a space."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    if at > MAX_HEAD_CHARS:
        raise _NoCall
    return at
