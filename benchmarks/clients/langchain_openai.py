"""langchain-openai: ChatOpenAI, OpenAI, tools, structured output."""

from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import TEXT, Weather, get_weather, valid

weather_tool = tool(get_weather)


def chat_model(server: Server, **fields: Any) -> ChatOpenAI:
    options = {"max_tokens": 300, "temperature": 0} | fields
    return ChatOpenAI(base_url=server.v1, api_key=server.key, model=server.model, **options)


@feature
def invoke(server: Server) -> None:
    answer = chat_model(server).invoke([SystemMessage("Be short."), HumanMessage(TEXT)])
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.usage_metadata
    assert answer.usage_metadata["output_tokens"] > 0


@feature
def stream(server: Server) -> None:
    chunks = list(chat_model(server, stream_usage=True).stream(TEXT))
    assert "".join(str(chunk.content) for chunk in chunks)
    assert any(chunk.usage_metadata for chunk in chunks)


@feature
async def ainvoke_and_batch(server: Server) -> None:
    answers = await chat_model(server, max_tokens=8).abatch([TEXT, TEXT])
    assert len(answers) == 2


@feature
def n(server: Server) -> None:
    result = chat_model(server, n=2, temperature=1, max_tokens=8).generate([[HumanMessage(TEXT)]])
    assert len(result.generations[0]) == 2


@feature
def logprobs(server: Server) -> None:
    answer = chat_model(server, logprobs=True, top_logprobs=2, max_tokens=4).invoke(TEXT)
    assert answer.response_metadata["logprobs"]["content"]


@feature
def bind_tools(server: Server) -> None:
    model = chat_model(server).bind_tools(
        [weather_tool], tool_choice="get_weather", parallel_tool_calls=False
    )
    answer = model.invoke(TEXT)
    (call,) = answer.tool_calls
    assert weather_tool.invoke(call["args"]).endswith("days.")


@feature
def bind_tools_any_stream(server: Server) -> None:
    model = chat_model(server).bind_tools(
        [weather_tool], tool_choice="any", parallel_tool_calls=False
    )
    whole: Any = None
    for chunk in model.stream(TEXT):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert call["name"] == "get_weather"
    valid(call["args"])


@feature
def tool_result(server: Server) -> None:
    call = {"name": "get_weather", "args": {"city": "Paris", "days": 1}, "id": "call_1"}
    messages = [
        HumanMessage(TEXT),
        AIMessage("", tool_calls=[{**call, "type": "tool_call"}]),
        ToolMessage("Sunny.", tool_call_id="call_1"),
    ]
    model = chat_model(server, max_tokens=16).bind_tools([weather_tool], tool_choice="none")
    assert model.invoke(messages).content


@feature
def structured_output_json_schema(server: Server) -> None:
    model = chat_model(server).with_structured_output(Weather)
    assert isinstance(model.invoke(TEXT), Weather)


@feature
def structured_output_function_calling(server: Server) -> None:
    model = chat_model(server).with_structured_output(Weather, method="function_calling")
    assert isinstance(model.invoke(TEXT), Weather)


@feature
def structured_output_json_mode(server: Server) -> None:
    # JSON mode holds the answer to JSON, and not to the schema: the model has to choose the keys.
    model = chat_model(server).with_structured_output(Weather, method="json_mode", include_raw=True)
    answer: Any = model.invoke(f"{TEXT} Answer in JSON.")
    assert answer["raw"].content.lstrip().startswith("{")


@feature
def structured_output_stream(server: Server) -> None:
    model = chat_model(server).with_structured_output(Weather)
    assert isinstance(list(model.stream(TEXT))[-1], Weather)


@feature
def responses_api(server: Server) -> None:
    answer = chat_model(server, use_responses_api=True, max_tokens=16).invoke(TEXT)
    assert answer.text


@feature
def responses_api_structured_output(server: Server) -> None:
    model = chat_model(server, use_responses_api=True).with_structured_output(Weather)
    assert isinstance(model.invoke(TEXT), Weather)


@feature
def responses_api_tools(server: Server) -> None:
    model = chat_model(server, use_responses_api=True).bind_tools(
        [weather_tool], tool_choice="get_weather", parallel_tool_calls=False
    )
    (call,) = model.invoke(TEXT).tool_calls
    valid(call["args"])


@feature
def text_completion(server: Server) -> None:
    model = OpenAI(base_url=server.v1, api_key=server.key, model=server.model, max_tokens=8)
    assert model.invoke("The capital")
    assert "".join(model.stream("The capital"))


@feature
def count_of_tokens(server: Server) -> None:
    answer = chat_model(server, max_tokens=1).invoke(TEXT)
    assert answer.response_metadata["token_usage"]["prompt_tokens"] > 0


if __name__ == "__main__":
    main()
