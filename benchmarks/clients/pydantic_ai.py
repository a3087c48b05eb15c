"""pydantic-ai: text, typed answers in each mode, tools, both of OpenAI's APIs and Anthropic's."""

from typing import Any

from pydantic_ai import Agent, ModelSettings, NativeOutput, RunContext, ToolOutput
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.providers.vllm import VLLMProvider

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import TEXT, Weather, get_weather

FEW = ModelSettings(max_tokens=300, parallel_tool_calls=False)
SETTINGS = ModelSettings(max_tokens=300, temperature=0, parallel_tool_calls=False)


def chat_model(server: Server) -> OpenAIChatModel:
    provider = OpenAIProvider(base_url=server.v1, api_key=server.key)
    return OpenAIChatModel(server.model, provider=provider, settings=SETTINGS)


def responses_model(server: Server) -> OpenAIResponsesModel:
    provider = OpenAIProvider(base_url=server.v1, api_key=server.key)
    return OpenAIResponsesModel(server.model, provider=provider, settings=SETTINGS)


def anthropic_model(server: Server) -> AnthropicModel:
    provider = AnthropicProvider(base_url=server.url, api_key=server.key)
    return AnthropicModel(server.model, provider=provider, settings=FEW)


def typed(model: Any, output: Any = Weather) -> None:
    """Runs an agent whose answer has a type; its own retries would hide a wrong first answer."""
    agent: Any = Agent(model, output_type=output, retries=0)
    assert isinstance(agent.run_sync(TEXT).output, Weather)


@feature
def text(server: Server) -> None:
    agent = Agent(chat_model(server), instructions="Be short.")
    result = agent.run_sync(TEXT)
    assert isinstance(result.output, str)
    assert result.output
    assert result.usage.output_tokens > 0


@feature
async def text_stream(server: Server) -> None:
    agent = Agent(chat_model(server))
    async with agent.run_stream(TEXT) as result:
        pieces = [piece async for piece in result.stream_text(delta=True)]
    assert "".join(pieces)


@feature
def vllm_provider(server: Server) -> None:
    provider = VLLMProvider(base_url=server.v1, api_key=server.key)
    model = OpenAIChatModel(server.model, provider=provider, settings=SETTINGS)
    assert Agent(model).run_sync(TEXT).output


@feature
def typed_answer(server: Server) -> None:
    typed(chat_model(server))


@feature
def typed_answer_by_tool(server: Server) -> None:
    typed(chat_model(server), ToolOutput(Weather))


@feature
def typed_answer_native(server: Server) -> None:
    typed(chat_model(server), NativeOutput(Weather))


@feature
async def typed_answer_stream(server: Server) -> None:
    agent = Agent(chat_model(server), output_type=NativeOutput(Weather), retries=0)
    async with agent.run_stream(TEXT) as result:
        assert [part async for part in result.stream_output()]
        assert isinstance(await result.get_output(), Weather)


def tool_first(context: RunContext[None]) -> ModelSettings:
    """The first request has to call the tool, and the next one has to answer."""
    choice: Any = ["get_weather"] if context.run_step == 1 else "none"
    return ModelSettings(tool_choice=choice)


def with_tool(model: Any) -> None:
    agent = Agent(model, tools=[get_weather], model_settings=tool_first, retries=0)
    result = agent.run_sync(TEXT)
    parts = [part for message in result.all_messages() for part in message.parts]
    (returned,) = [part for part in parts if isinstance(part, ToolReturnPart)]
    assert returned.model_response_str().endswith("days.")
    assert result.output


@feature
def function_tool(server: Server) -> None:
    with_tool(chat_model(server))


@feature
def output_function(server: Server) -> None:
    agent = Agent(chat_model(server), output_type=get_weather, retries=0)
    assert agent.run_sync(TEXT).output.endswith("days.")


@feature
def history(server: Server) -> None:
    agent = Agent(chat_model(server))
    first = agent.run_sync(TEXT)
    assert agent.run_sync("And in London?", message_history=first.all_messages()).output


@feature
def responses_text(server: Server) -> None:
    assert Agent(responses_model(server)).run_sync(TEXT).output


@feature
def responses_typed_answer(server: Server) -> None:
    typed(responses_model(server))


@feature
def responses_typed_answer_native(server: Server) -> None:
    typed(responses_model(server), NativeOutput(Weather))


@feature
def responses_function_tool(server: Server) -> None:
    with_tool(responses_model(server))


@feature
def anthropic_text(server: Server) -> None:
    assert Agent(anthropic_model(server)).run_sync(TEXT).output


@feature
def anthropic_typed_answer(server: Server) -> None:
    typed(anthropic_model(server))


@feature
def anthropic_function_tool(server: Server) -> None:
    with_tool(anthropic_model(server))


if __name__ == "__main__":
    main()
