"""litellm: its routes to OpenAI's APIs and to Anthropic's."""

import json
from typing import Any

import litellm

from benchmarks.clients.features import Server, feature, main, raised
from benchmarks.clients.weather import NAMED, QUESTION, TOOL, Weather, valid

litellm.telemetry = False
NOT_PARALLEL = {"tools": [TOOL], "parallel_tool_calls": False, "max_tokens": 300}


def complete(server: Server, **fields: Any) -> Any:
    """Returns a call of the route to OpenAI's chat completions."""
    return litellm.completion(
        model=f"openai/{server.model}",
        api_base=server.v1,
        api_key=server.key,
        messages=QUESTION,
        temperature=0,
        **fields,
    )


def messages(server: Server, **fields: Any) -> Any:
    """Returns a call of the route to Anthropic's Messages API."""
    return litellm.completion(
        model=f"anthropic/{server.model}",
        api_base=server.url,
        api_key=server.key,
        messages=QUESTION,
        **fields,
    )


@feature
def chat(server: Server) -> None:
    answer = complete(server, max_tokens=32)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


@feature
def chat_stream(server: Server) -> None:
    chunks = list(
        complete(server, max_tokens=16, stream=True, stream_options={"include_usage": True})
    )
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0


@feature
async def chat_async(server: Server) -> None:
    stream = await litellm.acompletion(
        model=f"hosted_vllm/{server.model}",
        api_base=server.v1,
        api_key=server.key,
        messages=QUESTION,
        max_tokens=8,
        stream=True,
    )
    assert [chunk async for chunk in stream]


@feature
def typed_answer(server: Server) -> None:
    answer = complete(server, max_tokens=200, response_format=Weather)
    assert Weather.model_validate_json(answer.choices[0].message.content)


@feature
def json_object(server: Server) -> None:
    answer = complete(server, max_tokens=400, response_format={"type": "json_object"})
    assert answer.choices[0].message.content.lstrip().startswith("{")


@feature
def tools_named(server: Server) -> None:
    message = complete(server, tool_choice=NAMED, **NOT_PARALLEL).choices[0].message
    (call,) = message.tool_calls
    valid(call.function.arguments)


@feature
def tools_stream(server: Server) -> None:
    chunks = list(complete(server, tool_choice="required", stream=True, **NOT_PARALLEL))
    (call,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    valid(call.function.arguments)


@feature
def text_completion(server: Server) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{server.model}",
        api_base=server.v1,
        api_key=server.key,
        prompt="The capital",
        max_tokens=8,
    )
    assert answer.choices[0].text


@feature
def responses(server: Server) -> None:
    answer = litellm.responses(
        model=f"openai/{server.model}",
        api_base=server.v1,
        api_key=server.key,
        input=QUESTION,
        max_output_tokens=16,
    )
    assert answer.output[0].content[0].text


@feature
def anthropic_messages(server: Server) -> None:
    assert messages(server, max_tokens=16).choices[0].message.content


@feature
def anthropic_stream(server: Server) -> None:
    chunks = list(messages(server, max_tokens=16, stream=True))
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content


@feature
def anthropic_tools(server: Server) -> None:
    message = messages(server, tool_choice=NAMED, tools=[TOOL], max_tokens=300).choices[0].message
    (call,) = message.tool_calls
    assert valid(json.loads(call.function.arguments))


@feature
def error(server: Server) -> None:
    refused = raised(litellm.BadRequestError, lambda: complete(server, max_tokens=4, top_p=9))
    assert "top_p" in str(refused)


if __name__ == "__main__":
    main()
