"""The answer of `/v1/messages`: a message, or the events of a streamed message."""

from typing import Any

from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import ResponseMetadata
from serve_app.protocol.text import TextDelta


def body(metadata: ResponseMetadata, num_input_tokens: int, whole: TextDelta) -> JsonObject:
    """The whole answer as a message."""
    content = [{"type": "text", "text": whole.text}] if whole.text else []
    return _message(metadata, content, _usage(num_input_tokens, whole.num_tokens), _stop(whole))


class MessageEvents:
    """Makes the events of one answer, delta by delta.

    `message_start` and a `ping` come first. Text is a content block: its start, deltas and stop.
    `message_delta` has why the answer ended, with its usage; `message_stop` is the last.
    """

    def __init__(self, metadata: ResponseMetadata, num_input_tokens: int) -> None:
        self._metadata = metadata
        self._num_input_tokens = num_input_tokens
        self._has_begun = self._is_in_text = False
        self._index = 0
        """Of the content block that is open, or that comes next."""

    def __call__(self, delta: TextDelta) -> list[JsonObject]:
        """The events for `delta`; none where it adds nothing."""
        events: list[JsonObject] = []
        if not self._has_begun:
            self._has_begun = True
            usage = _usage(self._num_input_tokens, 0)
            message = _message(self._metadata, [], usage, _NOT_STOPPED)
            events += [{"type": "message_start", "message": message}, {"type": "ping"}]
        if delta.text:
            if not self._is_in_text:
                events.append(self._block_start({"type": "text", "text": ""}))
                self._is_in_text = True
            events.append(self._block_delta({"type": "text_delta", "text": delta.text}))
        if delta.finish_reason is not None:
            if self._is_in_text:
                events.append(self._block_stop())
            usage = _usage(self._num_input_tokens, delta.num_tokens)
            events.append({"type": "message_delta", "delta": _stop(delta), "usage": usage})
            events.append({"type": "message_stop"})
        return events

    def _block_start(self, block: JsonObject) -> JsonObject:
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _block_delta(self, delta: JsonObject) -> JsonObject:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _block_stop(self) -> JsonObject:
        self._index, self._is_in_text = self._index + 1, False
        return {"type": "content_block_stop", "index": self._index - 1}


_NOT_STOPPED: JsonObject = {"stop_reason": None, "stop_sequence": None}


def _stop(end: TextDelta) -> JsonObject:
    """Why the answer ended."""
    if end.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop}
    reason = "max_tokens" if end.finish_reason == "length" else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


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


def _usage(num_input_tokens: int, num_output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": num_input_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": num_output_tokens,
    }
