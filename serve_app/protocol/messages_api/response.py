"""The answer of `/v1/messages`: a message, or the events of a streamed message."""

import json
from typing import Any

from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import ResponseMetadata
from serve_app.protocol.text import TextDelta
from serve_app.protocol.tools import ToolCallDelta, joined


def body(metadata: ResponseMetadata, num_input_tokens: int, whole: TextDelta) -> JsonObject:
    """Returns the whole answer as a message."""
    content: list[JsonObject] = [{"type": "text", "text": whole.text}] if whole.text else []
    for call in joined(whole.tool_calls):
        if (value := _input(call.arguments)) is not None:
            content.append(_tool_use(call.id, call.name, value))
    return _message(metadata, content, _usage(num_input_tokens, whole), _stop(whole))


class MessageEvents:
    """Creates the events of one answer, delta by delta.

    `message_start` and a `ping` come first. Each text and each call is a content block: its start,
    deltas and stop. `message_delta` has the stop reason and the usage; `message_stop` is last.
    """

    def __init__(self, metadata: ResponseMetadata, num_input_tokens: int) -> None:
        self._metadata = metadata
        self._num_input_tokens = num_input_tokens
        self._has_begun = False
        self._open: str | None = None
        """The type of the open content block."""
        self._index = -1
        """The index of the last content block."""

    def __call__(self, delta: TextDelta) -> list[JsonObject]:
        """Returns the events for `delta`; none if it adds nothing."""
        events: list[JsonObject] = []
        if not self._has_begun:
            self._has_begun = True
            usage = {**_usage(self._num_input_tokens, delta), "output_tokens": 0}
            message = _message(self._metadata, [], usage, _NOT_STOPPED)
            events += [{"type": "message_start", "message": message}, {"type": "ping"}]
        if delta.text:
            if self._open != "text":
                events += self._begin({"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for piece in delta.tool_calls:
            events += self._call(piece)
        if delta.finish_reason is not None:
            events += self._end()
            usage = _usage(self._num_input_tokens, delta)
            events.append({"type": "message_delta", "delta": _stop(delta), "usage": usage})
            events.append({"type": "message_stop"})
        return events

    def _call(self, piece: ToolCallDelta) -> list[JsonObject]:
        events: list[JsonObject] = []
        if piece.id is not None and piece.name is not None:
            events += self._begin(_tool_use(piece.id, piece.name, {}))
        if piece.arguments:
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
            events.append(self._delta(delta))
        return events

    def _begin(self, block: JsonObject) -> list[JsonObject]:
        """Ends the open block and begins `block`."""
        events = self._end()
        self._open, self._index = block["type"], self._index + 1
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return [*events, start]

    def _delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _end(self) -> list[JsonObject]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]


_NOT_STOPPED: JsonObject = {"stop_reason": None, "stop_sequence": None}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def _stop(end: TextDelta) -> JsonObject:
    """Returns the stop reason and the stop sequence."""
    if end.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}
    reason = _REASONS.get(end.finish_reason or "", "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _tool_use(call_id: str, name: str, value: Any) -> JsonObject:
    """Returns a content block with a call. Anthropic's ids of calls begin with `toolu_`."""
    own_id = f"toolu_{call_id.removeprefix('call_')}"
    return {"type": "tool_use", "id": own_id, "name": name, "input": value}


def _input(arguments: str) -> JsonObject | None:
    """Returns the arguments of a call; None if `max_tokens` has cut them, so that they are not
    JSON.

    With `{}` instead, a client would run the call.
    """
    try:
        value: JsonObject = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return value


def _message(
    metadata: ResponseMetadata, content: list[Any], usage: dict[str, int], stop: JsonObject
) -> JsonObject:
    return {
        "id": f"msg_{metadata.id}",
        "type": "message",
        "role": "assistant",
        "model": metadata.model,
        "content": content,
        **stop,
        "usage": usage,
    }


def _usage(num_input_tokens: int, so_far: TextDelta) -> dict[str, int]:
    """Returns the usage. As in Anthropic's API, `input_tokens` excludes cached tokens."""
    return {
        "input_tokens": num_input_tokens - so_far.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": so_far.num_cached_tokens,
        "output_tokens": so_far.num_tokens,
    }
