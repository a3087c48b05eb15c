"""smolagents: its two agents, its model alone and streamed."""

from typing import Any

from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import SCHEMA, TEXT, valid

QUESTION = [{"role": "user", "content": [{"type": "text", "text": TEXT}]}]
CODE = r'Thought: I ask\.\n<code>\nfinal_answer\(city_weather\("(Paris|London)"\)\)\n'
"""The text that the code agent's model must write, because the tiny model cannot write Python."""


@tool  # type: ignore[untyped-decorator]
def city_weather(city: str) -> str:
    """Gives the weather of a city.

    Args:
        city: The city.
    """
    return f"Sun in {city}."


city_weather.inputs["city"]["enum"] = ["Paris", "London"]


def model(server: Server, **fields: Any) -> OpenAIModel:
    options = {"max_tokens": 300, "temperature": 0} | fields
    return OpenAIModel(server.model, api_base=server.v1, api_key=server.key, **options)


@feature
def generate(server: Server) -> None:
    answer = model(server).generate(QUESTION, stop_sequences=["\n\n\n"])
    assert answer.content
    assert answer.token_usage.output_tokens > 0


@feature
def generate_stream(server: Server) -> None:
    deltas = list(model(server).generate_stream(QUESTION))
    assert "".join(delta.content or "" for delta in deltas)


@feature
def generate_by_schema(server: Server) -> None:
    schema = {"name": "weather", "schema": SCHEMA, "strict": True}
    answer = model(server).generate(
        QUESTION, response_format={"type": "json_schema", "json_schema": schema}
    )
    assert valid(answer.content)


@feature
def generate_tool_call(server: Server) -> None:
    answer = model(server, parallel_tool_calls=False).generate(
        QUESTION, tools_to_call_from=[city_weather]
    )
    (call,) = answer.tool_calls
    assert call.function.name == "city_weather"


def called_tool(agent: Any) -> None:
    """The agent called the tool with a valid city, and saw its result."""
    steps = agent.memory.steps
    assert any("Sun in " in str(getattr(step, "observations", "")) for step in steps)


@feature
def tool_calling_agent(server: Server) -> None:
    # The last step answers in text: the tiny model does not choose the tool for answers by itself.
    agent = ToolCallingAgent(
        [city_weather], model(server, parallel_tool_calls=False), max_steps=3, verbosity_level=0
    )
    assert agent.run(TEXT) is not None
    called_tool(agent)


@feature
def tool_calling_agent_stream(server: Server) -> None:
    agent = ToolCallingAgent(
        [city_weather],
        model(server, parallel_tool_calls=False),
        max_steps=2,
        stream_outputs=True,
        verbosity_level=0,
    )
    assert list(agent.run(TEXT, stream=True))
    called_tool(agent)


@feature
def code_agent(server: Server) -> None:
    steered = model(server, extra_body={"structured_outputs": {"regex": CODE}})
    agent = CodeAgent([city_weather], steered, max_steps=1, verbosity_level=0)
    assert agent.run(TEXT).startswith("Sun in ")


@feature
def code_agent_stream(server: Server) -> None:
    steered = model(server, extra_body={"structured_outputs": {"regex": CODE}})
    agent = CodeAgent([city_weather], steered, max_steps=1, stream_outputs=True, verbosity_level=0)
    assert agent.run(TEXT).startswith("Sun in ")


@feature
def code_agent_structured_output(server: Server) -> None:
    agent = CodeAgent(
        [city_weather],
        model(server, max_tokens=1000),
        max_steps=1,
        use_structured_outputs_internally=True,
        verbosity_level=0,
    )
    agent.run(TEXT)
    step = next(step for step in agent.memory.steps if getattr(step, "model_output", None))
    assert isinstance(step.code_action, str)


if __name__ == "__main__":
    main()
