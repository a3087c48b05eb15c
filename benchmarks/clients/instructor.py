"""instructor: its modes for OpenAI's and Anthropic's APIs."""

from collections.abc import Iterable
from typing import Any

import instructor
from anthropic import Anthropic
from instructor import Mode
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import QUESTION, SCHEMA, Weather


class Anything(BaseModel):
    """Any JSON object: JSON mode does not hold the answer to a schema, so the model may."""

    city: Any = None


def client(server: Server, mode: Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=server.v1, api_key=server.key), mode=mode)


def ask(server: Server, mode: Mode, expected: Any = Weather, **fields: Any) -> Any:
    """Returns an answer of the type `expected`; a retry would hide a wrong first one."""
    options = {"max_tokens": 400, "temperature": 0, "max_retries": 0} | fields
    answer = client(server, mode).create(
        model=server.model, messages=QUESTION, response_model=expected, **options
    )
    assert isinstance(answer, expected)
    return answer


def anthropic_client(server: Server, mode: Mode) -> Any:
    return instructor.from_anthropic(Anthropic(base_url=server.url, api_key=server.key), mode=mode)


@feature
def from_openai_default(server: Server) -> None:
    default = instructor.from_openai(OpenAI(base_url=server.v1, api_key=server.key))
    answer = default.chat.completions.create(
        model=server.model, messages=QUESTION, response_model=Weather, max_tokens=300, max_retries=0
    )
    assert isinstance(answer, Weather)


@feature
def tools(server: Server) -> None:
    ask(server, Mode.TOOLS)


@feature
def tools_strict(server: Server) -> None:
    ask(server, Mode.TOOLS_STRICT)


@feature
def json_schema(server: Server) -> None:
    ask(server, Mode.JSON_SCHEMA)


@feature
def json(server: Server) -> None:
    ask(server, Mode.JSON, Anything)


@feature
def md_json(server: Server) -> None:
    # This mode asks in words alone, so the grammar comes by vLLM's field.
    ask(server, Mode.MD_JSON, extra_body={"structured_outputs": {"json": SCHEMA}})


@feature
def parallel_tools(server: Server) -> None:
    calls = list(
        client(server, Mode.PARALLEL_TOOLS).create(
            model=server.model,
            messages=QUESTION,
            response_model=Iterable[Weather],
            max_tokens=2000,
            max_retries=0,
            extra_body={"tool_choice": "required"},  # the mode lets the model answer in text
        )
    )
    assert all(isinstance(call, Weather) for call in calls)


@feature
def partial(server: Server) -> None:
    parts = list(
        client(server, Mode.JSON_SCHEMA).create_partial(
            model=server.model, messages=QUESTION, response_model=Weather, max_tokens=300
        )
    )
    assert parts[-1].city in {"Paris", "London"}
    assert parts[-1].days in range(1, 8)


@feature
def with_completion(server: Server) -> None:
    answer, completion = client(server, Mode.TOOLS).create_with_completion(
        model=server.model, messages=QUESTION, response_model=Weather, max_tokens=300
    )
    assert isinstance(answer, Weather)
    assert completion.usage.completion_tokens > 0


@feature
async def asynchronous(server: Server) -> None:
    patched = instructor.from_openai(AsyncOpenAI(base_url=server.v1, api_key=server.key))
    answer = await patched.create(
        model=server.model, messages=QUESTION, response_model=Weather, max_tokens=300
    )
    assert isinstance(answer, Weather)


@feature
def responses_tools(server: Server) -> None:
    answer = client(server, Mode.RESPONSES_TOOLS).responses.create(
        model=server.model,
        input=QUESTION,
        response_model=Weather,
        max_output_tokens=300,
        max_retries=0,
    )
    assert isinstance(answer, Weather)


@feature
def anthropic_tools(server: Server) -> None:
    answer = anthropic_client(server, Mode.ANTHROPIC_TOOLS).create(
        model=server.model,
        messages=QUESTION,
        response_model=Weather,
        max_tokens=300,
        max_retries=0,
    )
    assert isinstance(answer, Weather)


@feature
def anthropic_json(server: Server) -> None:
    # This mode asks in words alone, so the grammar comes by Anthropic's own field.
    answer = anthropic_client(server, Mode.ANTHROPIC_JSON).create(
        model=server.model,
        messages=QUESTION,
        response_model=Weather,
        max_tokens=300,
        max_retries=0,
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert isinstance(answer, Weather)


if __name__ == "__main__":
    main()
