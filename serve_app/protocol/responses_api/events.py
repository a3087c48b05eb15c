"""The events of a streamed response of `/v1/responses`."""

from typing import Any

from serve_app.errors import ServeError
from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import ResponseMetadata
from serve_app.protocol.responses_api import response
from serve_app.protocol.responses_api.request import ResponsesRequest
from serve_app.protocol.text import TextDelta


class ResponseEvents:
    """Makes the events of one answer, delta by delta, with ascending sequence numbers.

    `response.created` and `response.in_progress` come first. Each item of the output is added,
    filled by deltas, and done. `response.completed` or `response.incomplete` is the last, or
    `response.failed`.
    """

    def __init__(
        self, request: ResponsesRequest, metadata: ResponseMetadata, num_input_tokens: int
    ) -> None:
        self._metadata = metadata
        self._num_input_tokens = num_input_tokens
        self._response = response.begun(request, metadata)
        self._sequence_number = 0
        self._output: list[JsonObject] = []
        """Items that are done."""
        self._text: list[str] | None = None
        """Pieces of the text of the message that is under way."""

    def __call__(self, delta: TextDelta) -> list[JsonObject]:
        """The events for `delta`; none where it adds nothing."""
        events: list[JsonObject] = []
        if not self.has_begun:
            events.append(self._event("response.created", response=self._response))
            events.append(self._event("response.in_progress", response=self._response))
        is_empty = delta.finish_reason is not None and not self._output
        if self._text is None and (delta.text or is_empty):
            events += self._begin_text()
        if delta.text and self._text is not None:
            self._text.append(delta.text)
            events.append(self._text_event("delta", delta=delta.text, logprobs=[]))
        if delta.finish_reason is not None:
            events += self._end_text(response.status_of(delta))
            whole = response.ended(self._response, self._output, self._num_input_tokens, delta)
            events.append(self._event(f"response.{whole['status']}", response=whole))
        return events

    @property
    def has_begun(self) -> bool:
        """Whether there was an event."""
        return self._sequence_number > 0

    def failed(self, error: ServeError) -> JsonObject:
        """The last event of an answer that fails after its first event."""
        whole = response.failed(self._response, self._output, error)
        return self._event("response.failed", response=whole)

    def _begin_text(self) -> list[JsonObject]:
        self._text = []
        item = response.message(self._metadata, "in_progress", [])
        return [
            self._event("response.output_item.added", output_index=len(self._output), item=item),
            self._part_event("added", response.output_text("")),
        ]

    def _end_text(self, status: response.Status) -> list[JsonObject]:
        if self._text is None:
            return []
        part = response.output_text("".join(self._text))
        self._text = None
        item = response.message(self._metadata, status, [part])
        events = [
            self._text_event("done", text=part["text"], logprobs=[]),
            self._part_event("done", part),
            self._event("response.output_item.done", output_index=len(self._output), item=item),
        ]
        self._output.append(item)
        return events

    def _text_event(self, name: str, **fields: Any) -> JsonObject:
        return self._item_event(f"response.output_text.{name}", content_index=0, **fields)

    def _part_event(self, name: str, part: JsonObject) -> JsonObject:
        return self._item_event(f"response.content_part.{name}", content_index=0, part=part)

    def _item_event(self, kind: str, **fields: Any) -> JsonObject:
        item_id = f"msg_{self._metadata.id}"
        return self._event(kind, item_id=item_id, output_index=len(self._output), **fields)

    def _event(self, kind: str, **fields: Any) -> JsonObject:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number - 1, **fields}
