"""The events of a streamed response of `/v1/responses`."""

from typing import Any

from serve_app.error_body import ErrorBody
from serve_app.errors import ServeError
from serve_app.protocol.call import JsonObject
from serve_app.protocol.response import ResponseMetadata, TokenNames
from serve_app.protocol.responses_api import response
from serve_app.protocol.responses_api.request import ResponsesRequest
from serve_app.protocol.scores import TokenScore, named, pieces
from serve_app.protocol.text import TextDelta
from serve_app.protocol.tools import ToolCall, ToolCallDelta


class ResponseEvents:
    """Creates the events of one answer, delta by delta, with ascending sequence numbers.

    `response.created` and `response.in_progress` come first. Each item of the output is added,
    filled by deltas, and done. The last event is `response.completed` or `response.incomplete`, or
    `response.failed` and `error`.
    """

    def __init__(
        self,
        request: ResponsesRequest,
        metadata: ResponseMetadata,
        num_input_tokens: int,
        names: TokenNames,
    ) -> None:
        self._metadata = metadata
        self._num_input_tokens = num_input_tokens
        self._names = names
        self._num_top = request.top_logprobs
        self._response = response.begun(request, metadata)
        self._sequence_number = 0
        self._output: list[JsonObject] = []
        """Finished items."""
        self._item: JsonObject | None = None
        """The current item, in the form in which it was added."""
        self._pieces: list[str] = []
        """The pieces of its text or of its arguments."""
        self._logprobs: list[JsonObject] = []
        """Log probabilities of its tokens."""
        self._held: list[TokenScore] = []
        """Scores of tokens that may not belong to the text."""
        self._num_chars = 0
        """Number of characters of the text so far."""
        self._has_called = False
        """Whether the answer has a tool call."""

    def __call__(self, delta: TextDelta) -> list[JsonObject]:
        """Returns the events for `delta`; none if it adds nothing."""
        events: list[JsonObject] = []
        if not self.has_begun:
            events.append(self._event("response.created", response=self._response))
            events.append(self._event("response.in_progress", response=self._response))
        self._held += delta.scores
        if delta.text:
            self._num_chars += len(delta.text)
            events += self._text(delta.text, self._scores_of_text())
        for piece in delta.tool_calls:
            events += self._call(piece)
        if delta.finish_reason is not None:
            if self._item is None and not self._output:
                events += self._begin(response.message(self._metadata, "in_progress", []))
            if self._held and not self._has_called:
                events += self._text("", self._held)
            events += self._end(response.status_of(delta))
            whole = response.ended(self._response, self._output, self._num_input_tokens, delta)
            events.append(self._event(f"response.{whole['status']}", response=whole))
        return events

    @property
    def has_begun(self) -> bool:
        """Whether there was an event."""
        return self._sequence_number > 0

    def failed(self, error: ServeError) -> JsonObject:
        """Returns the event of an answer that fails after its first event."""
        whole = response.failed(self._response, self._output, error)
        return self._event("response.failed", response=whole)

    def _scores_of_text(self) -> list[TokenScore]:
        """Removes the scores of the text so far from `_held`, and returns them."""
        if self._has_called:
            return []
        ready = [score for score in self._held if score.offset < self._num_chars]
        self._held = self._held[len(ready) :]
        return ready

    def _text(self, text: str, scores: list[TokenScore]) -> list[JsonObject]:
        """Returns the events for `text`; several if it has many scores."""
        events: list[JsonObject] = []
        if self._item is None or self._item["type"] != "message":
            events += self._begin(response.message(self._metadata, "in_progress", []))
        self._pieces.append(text)
        for piece in pieces(iter(scores)):
            logprobs = named(piece, self._num_top, self._names)
            self._logprobs += logprobs
            without_bytes = _without_bytes(logprobs)
            events.append(self._text_event("output_text.delta", delta=text, logprobs=without_bytes))
            text = ""
        return events

    def _call(self, piece: ToolCallDelta) -> list[JsonObject]:
        events: list[JsonObject] = []
        self._has_called = True
        if piece.id is not None and piece.name is not None:
            call = ToolCall(piece.id, piece.name, "")
            events += self._begin(response.function_call(call, "in_progress"))
        if piece.arguments:
            self._pieces.append(piece.arguments)
            arguments = piece.arguments
            events.append(self._item_event("function_call_arguments.delta", delta=arguments))
        return events

    def _begin(self, item: JsonObject) -> list[JsonObject]:
        """Ends the current item and begins `item`."""
        events = self._end("completed")
        self._item, self._pieces, self._logprobs = item, [], []
        events.append(self._output_event("added", item))
        if item["type"] == "message":
            part = response.output_text("", [])
            events.append(self._text_event("content_part.added", part=part))
        return events

    def _end(self, status: response.Status) -> list[JsonObject]:
        """Ends the current item, if any."""
        if self._item is None:
            return []
        whole = "".join(self._pieces)
        if self._item["type"] == "message":
            part = response.output_text(whole, self._logprobs)
            item = {**self._item, "status": status, "content": [part]}
            without_bytes = _without_bytes(self._logprobs)
            events = [
                self._text_event("output_text.done", text=whole, logprobs=without_bytes),
                self._text_event("content_part.done", part=part),
            ]
        else:
            item = {**self._item, "status": status, "arguments": whole}
            events = [self._item_event("function_call_arguments.done", arguments=whole)]
        events.append(self._output_event("done", item))
        self._output.append(item)
        self._item = None
        return events

    def _text_event(self, name: str, **fields: Any) -> JsonObject:
        return self._item_event(name, content_index=0, **fields)

    def _item_event(self, name: str, **fields: Any) -> JsonObject:
        assert self._item is not None
        index = len(self._output)
        return self._event(
            f"response.{name}", item_id=self._item["id"], output_index=index, **fields
        )

    def _output_event(self, name: str, item: JsonObject) -> JsonObject:
        index = len(self._output)
        return self._event(f"response.output_item.{name}", output_index=index, item=item)

    def _event(self, kind: str, **fields: Any) -> JsonObject:
        self._sequence_number += 1
        return {"type": kind, "sequence_number": self._sequence_number - 1, **fields}


def error_event(body: ErrorBody, last: JsonObject) -> JsonObject:
    """Returns the last event of a stream that fails after the event `last`, which is {} before the
    first.

    The event has the fields of OpenAI's event, and those of the error body, because OpenAI's
    clients raise its `error`.
    """
    fields = body["error"]
    return {
        "type": "error",
        "sequence_number": last["sequence_number"] + 1 if last else 0,
        "code": fields["code"],
        "message": fields["message"],
        "param": fields["param"],
        **body,
    }


def _without_bytes(logprobs: list[JsonObject]) -> list[JsonObject]:
    """Returns `logprobs` in the form of text events, without bytes."""
    return [
        {
            "token": token["token"],
            "logprob": token["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]} for top in token["top_logprobs"]
            ],
        }
        for token in logprobs
    ]
