"""Requests with tools to chat completions, for tests."""

import asyncio
import json
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_app.api.server import MixtralServer
from tests.tool_sets import function

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
PARIS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
WEATHER = function("get_weather", PARIS, description="The weather in a city.")
NOW = function("now")
NONE = {"tool_choice": "none"}


async def items(server: MixtralServer, **fields: Any) -> list[Any]:
    body = {"messages": QUESTION, "temperature": 0, "max_tokens": 120, **fields}
    return [item async for item in server.call("POST", CHAT, body, "1")]


def ask(server: MixtralServer, **fields: Any) -> Any:
    """Returns the choice of an answer that is no error."""
    (item,) = asyncio.run(items(server, **fields))
    ChatCompletion.model_validate(item["body"], strict=True)
    (choice,) = item["body"]["choices"]
    return choice


def error(server: MixtralServer, **fields: Any) -> Any:
    (item,) = asyncio.run(items(server, **fields))
    assert item["status"] == 400, item
    return item["error"]["error"]


def calls(choice: Any) -> list[tuple[str, Any]]:
    """Returns the names and arguments."""
    found = [call["function"] for call in choice["message"].get("tool_calls") or []]
    return [(each["name"], json.loads(each["arguments"])) for each in found]


def chunks(server: MixtralServer, **fields: Any) -> list[Any]:
    """Returns the chunks of a stream, each of which is one of the openai package's."""
    found = [item["chunk"] for item in asyncio.run(items(server, stream=True, **fields))]
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    return found
