"""openai, the package: chat completions, as text and as typed answers."""

import json
from typing import Any

from openai import AsyncOpenAI

from benchmarks.clients.features import Server, feature
from benchmarks.clients.openai_client import client
from benchmarks.clients.weather import QUESTION, SCHEMA, Weather, valid


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
