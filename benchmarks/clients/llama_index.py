"""LlamaIndex: OpenAILike on chat and text completions, structured output, tools."""

from typing import Any

from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

from benchmarks.clients.features import Server, feature, main
from benchmarks.clients.weather import TEXT, Weather, get_weather, valid

QUESTION = [ChatMessage(role="system", content="Be short."), ChatMessage(role="user", content=TEXT)]


def model(server: Server, **fields: Any) -> OpenAILike:
    options = {
        "is_chat_model": True,
        "is_function_calling_model": True,
        "context_window": 16384,
        "max_tokens": 300,
        "temperature": 0,
    }
    return OpenAILike(
        model=server.model, api_base=server.v1, api_key=server.key, **(options | fields)
    )


@feature
def chat(server: Server) -> None:
    assert model(server, max_tokens=16).chat(QUESTION).message.content


@feature
def stream_chat(server: Server) -> None:
    answers = list(model(server, max_tokens=16).stream_chat(QUESTION))
    assert "".join(answer.delta or "" for answer in answers) == answers[-1].message.content


@feature
async def achat(server: Server) -> None:
    assert (await model(server, max_tokens=8).achat(QUESTION)).message.content


@feature
def complete(server: Server) -> None:
    text = model(server, is_chat_model=False, max_tokens=8)
    assert text.complete("The capital").text
    assert list(text.stream_complete("The capital"))[-1].text


@feature
def logprobs(server: Server) -> None:
    answer = model(server, logprobs=True, top_logprobs=2, max_tokens=4).chat(QUESTION)
    assert answer.logprobs


@feature
def structured_predict_by_response_format(server: Server) -> None:
    answer = model(server, should_use_structured_outputs=True).structured_predict(
        Weather, PromptTemplate("What is the weather in {city}?"), city="Paris"
    )
    assert isinstance(answer, Weather)


@feature
def structured_predict_by_tool(server: Server) -> None:
    answer = model(server).structured_predict(
        Weather, PromptTemplate("What is the weather in {city}?"), city="Paris"
    )
    assert isinstance(answer, Weather)


@feature
def as_structured_llm(server: Server) -> None:
    structured = model(server, should_use_structured_outputs=True).as_structured_llm(Weather)
    assert isinstance(structured.chat(QUESTION).raw, Weather)


@feature
def chat_with_tools(server: Server) -> None:
    tool = FunctionTool.from_defaults(get_weather)
    llm = model(server)
    answer = llm.chat_with_tools([tool], user_msg=TEXT, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_weather"
    valid(call.tool_kwargs)


@feature
def stream_chat_with_tools(server: Server) -> None:
    tool = FunctionTool.from_defaults(get_weather)
    llm = model(server)
    last = list(llm.stream_chat_with_tools([tool], user_msg=TEXT, tool_required=True))[-1]
    (call,) = llm.get_tool_calls_from_response(last)
    valid(call.tool_kwargs)


@feature
def predict_and_call(server: Server) -> None:
    tool = FunctionTool.from_defaults(get_weather)
    answer = model(server).predict_and_call([tool], user_msg=TEXT, tool_required=True)
    assert "days." in str(answer)


if __name__ == "__main__":
    main()
