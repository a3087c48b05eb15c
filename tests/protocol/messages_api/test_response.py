"""The events of a message, gathered by Anthropic's own client."""

from typing import Any

from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given

from serve_app.protocol.messages_api.response import MessageEvents, body
from serve_app.protocol.response import ResponseMetadata
from tests.protocol.answers import Answer, answers, whole
from tests.validated import validated

METADATA = ResponseMetadata("r1", "tiny", 1, "fp_1")


@given(answers())
def test_the_events_are_the_message(deltas: Answer) -> None:
    """However an answer was cut, its events validate and give the message that it is as a whole."""
    events = MessageEvents(METADATA, 7)
    made = [event for delta in deltas for event in events(delta) if event["type"] != "ping"]
    gathered: Any = None
    buffers: dict[int, bytes] = {}
    for event in made:
        read: Any = validated(RawMessageStreamEvent, event)
        gathered = accumulate_event(event=read, current_snapshot=gathered, json_bufs=buffers)
    message: Message = validated(Message, body(METADATA, 7, whole(deltas)))
    assert gathered.to_dict(exclude_none=True) == message.to_dict(exclude_none=True)


@given(answers())
def test_one_block_is_open_at_a_time(deltas: Answer) -> None:
    """Each block begins after the one before has ended, and has deltas of its own kind alone."""
    events = MessageEvents(METADATA, 7)
    open_block: Any = None
    for event in [event for delta in deltas for event in events(delta)]:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                open_block = (event["index"], event["content_block"]["type"])
            case "content_block_delta":
                kind = {"text_delta": "text", "input_json_delta": "tool_use"}
                assert open_block == (event["index"], kind[event["delta"]["type"]])
            case "content_block_stop":
                assert open_block is not None
                assert open_block[0] == event["index"]
                open_block = None
    assert open_block is None
