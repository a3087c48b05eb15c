"""anthropic, the package: messages, streams, tools, typed answers, count_tokens."""

from typing import Any, Literal

import anthropic
from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel, ConfigDict

from benchmarks.clients.features import Server, feature, main, raised
from benchmarks.clients.weather import QUESTION, SCHEMA, Weather

TOOL: Any = {
    "name": "get_weather",
    "description": "Gives the weather of a city.",
    "input_schema": SCHEMA,
}


def client(server: Server) -> Anthropic:
    return Anthropic(base_url=server.url, api_key=server.key, max_retries=0)


@feature
def messages(server: Server) -> None:
    answer = client(server).messages.create(
        model=server.model, max_tokens=32, system="Be short.", messages=QUESTION
    )
    assert answer.content[0].type == "text"
    assert answer.content[0].text
    assert answer.usage.output_tokens > 0
    assert answer.stop_reason in {"end_turn", "max_tokens"}


@feature
def bearer_token(server: Server) -> None:
    with_bearer = Anthropic(base_url=server.url, auth_token=server.key, max_retries=0)
    answer = with_bearer.messages.create(model=server.model, max_tokens=4, messages=QUESTION)
    assert answer.role == "assistant"


@feature
def blocks_and_stop_sequences(server: Server) -> None:
    blocks: Any = [{"type": "text", "text": "Hello.", "cache_control": {"type": "ephemeral"}}]
    answer = client(server).messages.create(
        model=server.model,
        max_tokens=64,
        system=blocks,
        messages=[{"role": "user", "content": blocks}],
        stop_sequences=["e"],
        metadata={"user_id": "u"},
        extra_body={"temperature": 0.5, "top_k": 20},  # the package has no arguments for them
    )
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "e"


@feature
def stream(server: Server) -> None:
    events = list(
        client(server).messages.create(
            model=server.model, max_tokens=16, messages=QUESTION, stream=True
        )
    )
    assert events[0].type == "message_start"
    assert events[-1].type == "message_stop"


@feature
def stream_helper(server: Server) -> None:
    with client(server).messages.stream(
        model=server.model, max_tokens=32, messages=QUESTION
    ) as streamed:
        text = "".join(streamed.text_stream)
        assert text
        assert text == streamed.get_final_text()
        assert streamed.get_final_message().usage.output_tokens > 0


@feature
async def stream_async(server: Server) -> None:
    async with (
        AsyncAnthropic(base_url=server.url, api_key=server.key) as asynchronous,
        asynchronous.messages.stream(
            model=server.model, max_tokens=8, messages=QUESTION
        ) as streamed,
    ):
        assert "".join([text async for text in streamed.text_stream])


@feature
def count_tokens(server: Server) -> None:
    counted = client(server).messages.count_tokens(model=server.model, messages=QUESTION)
    answer = client(server).messages.create(model=server.model, max_tokens=1, messages=QUESTION)
    assert counted.input_tokens == answer.usage.input_tokens


@feature
def count_tokens_of_tools(server: Server) -> None:
    counted = client(server).messages.count_tokens(
        model=server.model, messages=QUESTION, tools=[TOOL]
    )
    plain = client(server).messages.count_tokens(model=server.model, messages=QUESTION)
    assert counted.input_tokens > plain.input_tokens


def call(server: Server, choice: Any, **fields: Any) -> Any:
    """Returns the one tool call that the model is made to write."""
    answer = client(server).messages.create(
        model=server.model,
        max_tokens=300,
        messages=QUESTION,
        tools=[TOOL],
        tool_choice=choice,
        **fields,
    )
    assert answer.stop_reason == "tool_use"
    (block,) = [block for block in answer.content if block.type == "tool_use"]
    Weather.model_validate(block.input)
    return block


@feature
def tools_any(server: Server) -> None:
    assert call(server, {"type": "any", "disable_parallel_tool_use": True}).name == "get_weather"


@feature
def tools_named(server: Server) -> None:
    call(server, {"type": "tool", "name": "get_weather"})


@feature
def tools_auto(server: Server) -> None:
    answer = client(server).messages.create(
        model=server.model, max_tokens=64, messages=QUESTION, tools=[TOOL]
    )
    assert answer.content


@feature
def tools_result(server: Server) -> None:
    block = call(server, {"type": "tool", "name": "get_weather"})
    result: Any = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny."}
    answer = client(server).messages.create(
        model=server.model,
        max_tokens=16,
        tools=[TOOL],
        tool_choice={"type": "none"},
        messages=[
            *QUESTION,
            {"role": "assistant", "content": [block]},
            {"role": "user", "content": [result]},
        ],
    )
    assert answer.content[0].type == "text"


@feature
def tools_stream_helper(server: Server) -> None:
    with client(server).messages.stream(
        model=server.model,
        max_tokens=300,
        messages=QUESTION,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "get_weather"},
    ) as streamed:
        parts = [event.partial_json for event in streamed if event.type == "input_json"]
        final = streamed.get_final_message()
    (block,) = [block for block in final.content if block.type == "tool_use"]
    assert Weather.model_validate_json("".join(parts)).model_dump() == block.input


class Forecast(BaseModel):
    """A class without limits of numbers: the client sends those as a part of the description."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "London"]
    is_sunny: bool


@feature
def parse(server: Server) -> None:
    answer = client(server).messages.parse(
        model=server.model, max_tokens=200, messages=QUESTION, output_format=Forecast
    )
    assert isinstance(answer.parsed_output, Forecast)


@feature
def models(server: Server) -> None:
    assert [model.id for model in client(server).models.list()] == [server.model]


@feature
def errors(server: Server) -> None:
    def ask(with_key: str, **fields: Any) -> None:
        Anthropic(base_url=server.url, api_key=with_key, max_retries=0).messages.create(
            model=server.model, max_tokens=4, messages=QUESTION, **fields
        )

    refused = raised(
        anthropic.BadRequestError, lambda: ask(server.key, extra_body={"no_such_field": 1})
    )
    assert refused.type == "invalid_request_error"
    assert "no_such_field" in refused.message
    assert (
        raised(anthropic.AuthenticationError, lambda: ask("wrong")).type == "authentication_error"
    )


if __name__ == "__main__":
    main()
