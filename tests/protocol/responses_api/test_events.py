"""The events of a response, gathered by OpenAI's own client."""

from typing import Any

from hypothesis import given
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent

from serve_app.errors import OutOfMemory
from serve_app.protocol.response import ResponseMetadata
from serve_app.protocol.responses_api.events import ResponseEvents
from serve_app.protocol.responses_api.request import LOGPROBS, ResponsesRequest
from serve_app.protocol.responses_api.response import body
from tests.fakes import tokenizer
from tests.protocol.answers import Answer, answers, whole
from tests.validated import validated

METADATA = ResponseMetadata("r1", "tiny", 1, "fp_1")
REQUEST = ResponsesRequest.read({"input": "Hi", "include": [LOGPROBS], "top_logprobs": 2})
NAMES = tokenizer()


@given(answers())
def test_the_events_are_the_response(deltas: Answer) -> None:
    """However an answer was cut, its events validate, are numbered, and give the response that it
    is as a whole; the client gathers the same output from the deltas."""
    events = ResponseEvents(REQUEST, METADATA, 7, NAMES)
    made = [event for delta in deltas for event in events(delta)]
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=omit, text_format=omit)
    for event in made:
        state.handle_event(validated(ResponseStreamEvent, event))
    assert [event["sequence_number"] for event in made] == list(range(len(made)))
    response = body(REQUEST, METADATA, 7, NAMES, whole(deltas))
    validated(Response, response)
    assert made[-1]["response"] == response
    done = [event["item"] for event in made if event["type"] == "response.output_item.done"]
    assert done == response["output"]


@given(answers())
def test_items_are_filled_one_after_another(deltas: Answer) -> None:
    """Each delta belongs to the item that was added last and is not done; all of its deltas are
    its whole text with its log probabilities, or its whole arguments."""
    events = ResponseEvents(REQUEST, METADATA, 7, NAMES)
    open_item: Any = None
    filled, logprobs = "", list[Any]()
    for event in [event for delta in deltas for event in events(delta)]:
        match event["type"].removeprefix("response."):
            case "output_item.added":
                assert open_item is None
                open_item, filled = (event["item"]["id"], event["output_index"]), ""
                logprobs = []
            case "output_text.delta" | "function_call_arguments.delta":
                assert open_item == (event["item_id"], event["output_index"])
                filled += event["delta"]
                logprobs += event.get("logprobs", [])
            case "output_text.done":
                assert (event["text"], event["logprobs"]) == (filled, logprobs)
            case "function_call_arguments.done":
                assert event["arguments"] == filled
            case "output_item.done":
                assert open_item == (event["item"]["id"], event["output_index"])
                open_item = None
    assert open_item is None


@given(answers())
def test_a_failure_keeps_the_output_that_is_done(deltas: Answer) -> None:
    """`response.failed` validates at any time, and goes on with the numbers."""
    events = ResponseEvents(REQUEST, METADATA, 7, NAMES)
    made = [event for delta in deltas[:-1] for event in events(delta)]
    failed = events.failed(OutOfMemory("No memory."))
    validated(ResponseStreamEvent, failed)
    assert failed["sequence_number"] == len(made)
    done = [event["item"] for event in made if event["type"] == "response.output_item.done"]
    assert failed["response"]["output"] == done
