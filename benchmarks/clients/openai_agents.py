"""openai-agents: its Responses model, which is the default, and its chat model."""

from typing import Any

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import TEXT, Weather, get_weather

set_tracing_disabled(True)
weather_tool = function_tool(get_weather)
SETTINGS = ModelSettings(max_tokens=300, temperature=0)
REQUIRED = ModelSettings(
    max_tokens=300, temperature=0, tool_choice="required", parallel_tool_calls=False
)


def chat(server: Server) -> Any:
    client = AsyncOpenAI(base_url=server.v1, api_key=server.key)
    return OpenAIChatCompletionsModel(server.model, openai_client=client)


def responses(server: Server) -> Any:
    client = AsyncOpenAI(base_url=server.v1, api_key=server.key)
    return OpenAIResponsesModel(server.model, openai_client=client)


async def text(model: Any) -> None:
    agent = Agent(name="a", instructions="Be short.", model=model, model_settings=SETTINGS)
    result = await Runner.run(agent, TEXT, run_config=RunConfig(tracing_disabled=True))
    assert isinstance(result.final_output, str)
    assert result.final_output
    # The second turn brings the first one along.
    items = [*result.to_input_list(), {"role": "user", "content": "And in London?"}]
    assert (await Runner.run(agent, items)).final_output


async def stream(model: Any) -> None:
    agent = Agent(name="a", model=model, model_settings=SETTINGS)
    result = Runner.run_streamed(agent, TEXT)
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert "".join(deltas) == result.final_output


async def typed(model: Any) -> None:
    agent = Agent(name="a", model=model, model_settings=SETTINGS, output_type=Weather)
    assert isinstance((await Runner.run(agent, TEXT)).final_output, Weather)


async def tool(model: Any) -> None:
    """The tool's result is the final output, because the model would not stop by itself."""
    agent = Agent(
        name="a",
        model=model,
        model_settings=REQUIRED,
        tools=[weather_tool],
        tool_use_behavior="stop_on_first_tool",
    )
    result = await Runner.run(agent, TEXT)
    assert result.final_output.endswith("days.")


async def tool_then_answer(model: Any) -> None:
    """Sends the tool's result to the model, which then chooses whether to call a tool (`auto`)."""
    agent = Agent(name="a", model=model, model_settings=REQUIRED, tools=[weather_tool])
    result = await Runner.run(agent, TEXT, max_turns=6)
    assert result.final_output
    assert any(item.type == "tool_call_output_item" for item in result.new_items)


async def tool_stream(model: Any) -> None:
    agent = Agent(
        name="a",
        model=model,
        model_settings=REQUIRED,
        tools=[weather_tool],
        tool_use_behavior="stop_on_first_tool",
    )
    result = Runner.run_streamed(agent, TEXT)
    events = [event async for event in result.stream_events()]
    assert any(getattr(event, "name", "") == "tool_called" for event in events)
    assert result.final_output.endswith("days.")


async def handoff(model: Any) -> None:
    """A handoff is a tool without arguments, which the model has to call."""
    other = Agent(name="other", model=model, model_settings=SETTINGS)
    agent = Agent(name="a", model=model, model_settings=REQUIRED, handoffs=[other])
    result = await Runner.run(agent, TEXT)
    assert result.last_agent.name == "other"
    assert result.final_output


@feature
async def responses_text(server: Server) -> None:
    await text(responses(server))


@feature
async def responses_stream(server: Server) -> None:
    await stream(responses(server))


@feature
async def responses_typed_output(server: Server) -> None:
    await typed(responses(server))


@feature
async def responses_function_tool(server: Server) -> None:
    await tool(responses(server))


@feature
async def responses_tool_then_answer(server: Server) -> None:
    await tool_then_answer(responses(server))


@feature
async def responses_function_tool_stream(server: Server) -> None:
    await tool_stream(responses(server))


@feature
async def responses_handoff(server: Server) -> None:
    await handoff(responses(server))


@feature
async def chat_text(server: Server) -> None:
    await text(chat(server))


@feature
async def chat_stream(server: Server) -> None:
    await stream(chat(server))


@feature
async def chat_typed_output(server: Server) -> None:
    await typed(chat(server))


@feature
async def chat_function_tool(server: Server) -> None:
    await tool(chat(server))


@feature
async def chat_tool_then_answer(server: Server) -> None:
    await tool_then_answer(chat(server))


@feature
async def chat_function_tool_stream(server: Server) -> None:
    await tool_stream(chat(server))


@feature
async def chat_handoff(server: Server) -> None:
    await handoff(chat(server))


if __name__ == "__main__":
    main()
