"""openai, the package: the Responses API."""

from typing import Any

import openai

from benchmarks.clients.features import Server, feature
from benchmarks.clients.openai_client import client
from benchmarks.clients.weather import FUNCTION, QUESTION, Weather, valid

RESPONSES_TOOL: Any = {"type": "function", **FUNCTION, "strict": True}


@feature
def responses(server: Server) -> None:
    answer = client(server).responses.create(
        model=server.model,
        instructions="Be short.",
        input="What is the capital of France?",
        max_output_tokens=32,
    )
    assert answer.output_text
    assert answer.usage
    assert answer.usage.output_tokens > 0


@feature
def responses_logprobs(server: Server) -> None:
    answer = client(server).responses.create(
        model=server.model,
        input=QUESTION,
        max_output_tokens=4,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
    )
    (message,) = [item for item in answer.output if item.type == "message"]
    (part,) = [each for each in message.content if each.type == "output_text"]
    assert part.logprobs
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in part.logprobs)


@feature
def responses_stream(server: Server) -> None:
    events = list(
        client(server).responses.create(
            model=server.model, input=QUESTION, max_output_tokens=16, stream=True
        )
    )
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta")


@feature
def responses_stream_helper(server: Server) -> None:
    with client(server).responses.stream(
        model=server.model, input=QUESTION, max_output_tokens=200, text_format=Weather
    ) as stream:
        assert any(event.type == "response.output_text.delta" for event in stream)
        assert isinstance(stream.get_final_response().output_parsed, Weather)


@feature
def responses_parse(server: Server) -> None:
    answer = client(server).responses.parse(
        model=server.model, input=QUESTION, max_output_tokens=200, text_format=Weather
    )
    assert isinstance(answer.output_parsed, Weather)


@feature
def responses_tools(server: Server) -> None:
    asking = client(server).responses.create(
        model=server.model,
        input=QUESTION,
        max_output_tokens=300,
        tools=[RESPONSES_TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = [item for item in asking.output if item.type == "function_call"]
    valid(call.arguments)
    items: Any = [
        *QUESTION,
        *asking.output,
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."},
    ]
    answer = client(server).responses.create(
        model=server.model,
        input=items,
        max_output_tokens=16,
        tools=[RESPONSES_TOOL],
        tool_choice="none",
    )
    assert answer.output_text


@feature
def responses_tools_stream(server: Server) -> None:
    with client(server).responses.stream(
        model=server.model,
        input=QUESTION,
        max_output_tokens=300,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert any(event.type == "response.function_call_arguments.delta" for event in events)
    calls = [item for item in final.output if item.type == "function_call"]
    assert calls
    assert all(isinstance(call.parsed_arguments, Weather) for call in calls)
