"""openai, the package: its plain calls, its helpers, its typed answers."""

import json
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI

from benchmarks.clients.features import Server, feature, main, raised
from benchmarks.clients.weather import FUNCTION, NAMED, QUESTION, SCHEMA, TOOL, Weather, valid

RESPONSES_TOOL: Any = {"type": "function", **FUNCTION, "strict": True}


def client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.v1, api_key=server.key, max_retries=0)


@feature
def models(server: Server) -> None:
    listed = client(server).models.list()
    assert [model.id for model in listed.data] == [server.model]
    assert client(server).models.retrieve(server.model).id == server.model


@feature
def chat(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model, messages=QUESTION, max_completion_tokens=32, temperature=0, seed=1
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@feature
def chat_stream(server: Server) -> None:
    chunks = client(server).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    all_chunks = list(chunks)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in all_chunks if chunk.choices)
    assert all_chunks[-1].usage


@feature
def chat_stream_helper(server: Server) -> None:
    with client(server).chat.completions.stream(
        model=server.model, messages=QUESTION, max_tokens=32
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == stream.get_final_completion().choices[0].message.content
        assert text


@feature
async def chat_async(server: Server) -> None:
    async with AsyncOpenAI(base_url=server.v1, api_key=server.key) as asynchronous:
        chunks = await asynchronous.chat.completions.create(
            model=server.model, messages=QUESTION, max_tokens=8, stream=True
        )
        assert [chunk async for chunk in chunks]


@feature
def chat_with_content_parts_and_roles(server: Server) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}], "name": "anna"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    answer = client(server).chat.completions.create(
        model=server.model, messages=messages, max_tokens=8, stop=["\n\n"], user="u", store=False
    )
    assert answer.choices[0].finish_reason in {"stop", "length"}


@feature
def chat_logprobs(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model, messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in logprobs.content)


@feature
def chat_n(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model, messages=QUESTION, max_tokens=4, n=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


@feature
def json_object(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        max_tokens=300,
        temperature=0,
        response_format={"type": "json_object"},
    )
    content = answer.choices[0].message.content or ""
    assert content.lstrip().startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


@feature
def json_schema(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model,
        messages=QUESTION,
        max_tokens=200,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "w", "schema": SCHEMA, "strict": True},
        },
    )
    valid(answer.choices[0].message.content or "")


@feature
def parse(server: Server) -> None:
    answer = client(server).chat.completions.parse(
        model=server.model, messages=QUESTION, max_tokens=200, response_format=Weather
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


@feature
def parse_stream(server: Server) -> None:
    with client(server).chat.completions.stream(
        model=server.model, messages=QUESTION, max_tokens=200, response_format=Weather
    ) as stream:
        parsed = [event.parsed for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert parsed
    assert isinstance(final.choices[0].message.parsed, Weather)


@feature
def tools_required(server: Server) -> None:
    answer = client(server).chat.completions.create(
        model=server.model, messages=QUESTION, max_tokens=300, tools=[TOOL], tool_choice="required"
    )
    choice = answer.choices[0]
    calls = choice.message.tool_calls or []
    assert calls
    # The tiny model may call its tool until `max_tokens` cuts the last call.
    for call in calls[:-1] if choice.finish_reason == "length" else calls:
        assert call.type == "function"
        assert call.function.name == "get_weather"
        valid(call.function.arguments)


@feature
def tools_named(server: Server) -> None:
    choice = (
        client(server)
        .chat.completions.create(
            model=server.model,
            messages=QUESTION,
            max_tokens=300,
            tools=[TOOL],
            tool_choice=NAMED,
        )
        .choices[0]
    )
    assert choice.message.tool_calls
    assert len(choice.message.tool_calls) == 1
    assert choice.message.tool_calls[0].type == "function"
    valid(choice.message.tool_calls[0].function.arguments)


@feature
def tools_auto(server: Server) -> None:
    choice = (
        client(server)
        .chat.completions.create(
            model=server.model, messages=QUESTION, max_tokens=100, temperature=0, tools=[TOOL]
        )
        .choices[0]
    )
    assert choice.message.content or choice.message.tool_calls


@feature
def tools_not_parallel(server: Server) -> None:
    choice = (
        client(server)
        .chat.completions.create(
            model=server.model,
            messages=QUESTION,
            max_tokens=300,
            tools=[TOOL],
            tool_choice="required",
            parallel_tool_calls=False,
        )
        .choices[0]
    )
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
    choice = (
        client(server)
        .chat.completions.create(
            model=server.model,
            messages=messages,
            max_tokens=16,
            tools=[TOOL],
            tool_choice="none",
        )
        .choices[0]
    )
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


@feature
def completions(server: Server) -> None:
    answer = client(server).completions.create(
        model=server.model, prompt=["The capital", "The"], max_tokens=8, logprobs=2, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs and choice.logprobs.tokens for choice in answer.choices)


@feature
def completions_stream(server: Server) -> None:
    chunks = client(server).completions.create(
        model=server.model, prompt="The capital", max_tokens=8, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks)


@feature
def completions_echo_logprobs(server: Server) -> None:
    answer = client(server).completions.create(
        model=server.model, prompt="The capital", max_tokens=1, logprobs=1, echo=True
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The capital")
    assert logprobs
    assert logprobs.token_logprobs
    assert logprobs.token_logprobs[0] is None
    assert all(each <= 0 for each in logprobs.token_logprobs[1:])


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


@feature
def errors(server: Server) -> None:
    def hot() -> None:
        client(server).chat.completions.create(model=server.model, messages=QUESTION, temperature=9)

    assert raised(openai.BadRequestError, hot).param == "temperature"
    stranger = OpenAI(base_url=server.v1, api_key="wrong", max_retries=0)
    assert raised(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"


if __name__ == "__main__":
    main()
