"""openai, the package: tools in chat completions."""

from typing import Any

import openai

from benchmarks.clients.features import Server, feature
from benchmarks.clients.openai_client import client
from benchmarks.clients.weather import NAMED, QUESTION, TOOL, Weather, valid


def ask(server: Server, **fields: Any) -> Any:
    """Returns the choice of a chat completion about the weather, with the tool and `fields`."""
    fields = {"messages": QUESTION, "max_tokens": 300, "tools": [TOOL], **fields}
    return client(server).chat.completions.create(model=server.model, **fields).choices[0]


@feature
def tools_required(server: Server) -> None:
    choice = ask(server, tool_choice="required")
    calls = choice.message.tool_calls or []
    assert calls
    # The tiny model may call its tool until `max_tokens` cuts the last call.
    for call in calls[:-1] if choice.finish_reason == "length" else calls:
        assert call.type == "function"
        assert call.function.name == "get_weather"
        valid(call.function.arguments)


@feature
def tools_named(server: Server) -> None:
    choice = ask(server, tool_choice=NAMED)
    assert choice.message.tool_calls
    assert len(choice.message.tool_calls) == 1
    assert choice.message.tool_calls[0].type == "function"
    valid(choice.message.tool_calls[0].function.arguments)


@feature
def tools_auto(server: Server) -> None:
    choice = ask(server, max_tokens=100, temperature=0)
    assert choice.message.content or choice.message.tool_calls


@feature
def tools_not_parallel(server: Server) -> None:
    choice = ask(server, tool_choice="required", parallel_tool_calls=False)
    assert choice.finish_reason == "tool_calls"
    assert len(choice.message.tool_calls or ()) == 1


@feature
def tools_result(server: Server) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris", "days": 1}'}
    messages = [
        *QUESTION,
        {
            "role": "assistant",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    choice = ask(server, messages=messages, max_tokens=16, tool_choice="none")
    assert choice.message.content
    assert not choice.message.tool_calls


@feature
def tools_stream_helper(server: Server) -> None:
    with client(server).chat.completions.stream(
        model=server.model,
        messages=QUESTION,
        max_tokens=300,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = "".join(
        event.arguments_delta
        for event in events
        if event.type == "tool_calls.function.arguments.delta"
    )
    (call,) = final.choices[0].message.tool_calls or []
    assert deltas == call.function.arguments
    assert isinstance(call.function.parsed_arguments, Weather)
    assert any(event.type == "tool_calls.function.arguments.done" for event in events)


@feature
def tools_parse(server: Server) -> None:
    answer = client(server).chat.completions.parse(
        model=server.model,
        messages=QUESTION,
        max_tokens=300,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in calls)
