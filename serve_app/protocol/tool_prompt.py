"""Writes tools, calls and results into a prompt, in one of two forms.

- `mistral_parts` is for a checkpoint that was trained with Mistral's tool tokens, such as
  Mixtral-8x22B-Instruct-v0.1. Its ids equal those of Mistral's own encoder (mistral-common's v3).
  The checkpoint's chat template gives other ids: it omits the system message after a result, and
  does not escape descriptions.
- `plain_turns` is for any other checkpoint, such as Mixtral-8x7B-Instruct-v0.1. The tools become
  text of the system message, calls text of the assistant, and results text of the user, and the
  checkpoint's chat template renders them.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.protocol.conversation import Turn
from serve_app.protocol.field_types import is_unicode
from serve_app.protocol.messages import Message
from serve_app.protocol.tool_calls import MARKER
from serve_app.protocol.tools import Tool, ToolCall

MISTRAL_TOKENS = (
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    MARKER,
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[INST]",
    "[/INST]",
)
"""Control tokens of a checkpoint that was trained for tools."""
_MISTRAL_ID = re.compile("[A-Za-z0-9]{9}")


def num_chars(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """Returns the number of characters in a prompt that come from the client."""
    calls = [call for message in messages for call in message.tool_calls]
    texts = [message.content for message in messages]
    texts += [call.name + call.arguments for call in calls]
    return sum(map(len, texts)) + sum(len(_json(_described(tool))) for tool in tools)


def plain_turns(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Turn]:
    """Returns the conversation with the roles system, user and assistant only.

    The tools are at the end of the first system message, so that the prompts of a conversation have
    a common beginning. Adjacent results become one message.
    """
    turns: list[Turn] = []
    names: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool":
            name = names.get(message.tool_call_id or "", "")
            results.append({"name": name, "content": _parsed(message.content)})
            if len(results) > 1:
                turns.pop()
            turns.append({"role": "user", "content": f"[TOOL_RESULTS] {_json(results)}"})
            continue
        results = []
        content = message.content
        if message.tool_calls:
            calls = [_call(call) for call in message.tool_calls]
            content = f"{content}\n\n{MARKER} {_json(calls)}".lstrip()
        turns.append({"role": message.role, "content": content})
    if not tools:
        return turns
    system = _instructions(tools)
    if turns and turns[0]["role"] == "system":
        system = f"{turns.pop(0)['content']}\n\n{system}"
    return [{"role": "system", "content": system}, *turns]


def _instructions(tools: Sequence[Tool]) -> str:
    listed = "\n".join(_json(_described(tool)) for tool in tools)
    return (
        "You can call these functions. Each line has the name of a function, what it does, and the "
        f"JSON schema of its arguments:\n{listed}\n\n"
        "To call functions, answer with nothing but this line, a JSON list of calls:\n"
        f'{MARKER} [{{"name": "the function\'s name", "arguments": {{"argument": "value"}}}}]\n'
        "The results then come in a message that begins with [TOOL_RESULTS]. "
        "When you need no function, answer in plain text."
    )


class Control(str):
    """A control token in a list of texts."""


def mistral_parts(
    messages: Sequence[Message], tools: Sequence[Tool], special_tokens: Mapping[str, str]
) -> list[str]:
    """Returns a conversation as a list of `Control` tokens and texts, which are tokenized
    separately.

    `special_tokens` has `bos_token` and `eos_token`. The tools and the system message come before
    the last message of the user.
    """
    system = "\n\n".join(
        message.content for message in messages if message.role == "system" and message.content
    )
    turns = _merged([message for message in messages if message.role != "system"])
    last = max(index for index, message in enumerate(turns) if message.role == "user")
    parts: list[str] = [Control(special_tokens["bos_token"])]
    if turns[0].role != "user":
        parts += [Control("[INST]"), Control("[/INST]")]
    for index, message in enumerate(turns):
        content = message.content
        if message.role == "tool":
            result = {
                "content": _parsed(content or "{}"),
                "call_id": _mistral_id(message.tool_call_id or ""),
            }
            parts += _between("[TOOL_RESULTS]", _json(result), "[/TOOL_RESULTS]")
        elif message.role == "assistant":
            parts.append(content.rstrip(" "))
            if message.tool_calls:
                calls = [{**_call(call), "id": _mistral_id(call.id)} for call in message.tool_calls]
                parts += [Control(MARKER), _json(calls)]
            parts.append(Control(special_tokens["eos_token"]))
        else:
            if index == last and tools:
                listed = [{"type": "function", "function": _described(tool)} for tool in tools]
                parts += _between("[AVAILABLE_TOOLS]", _json(listed), "[/AVAILABLE_TOOLS]")
            if index == last and system:
                content = f"{system}\n\n{content}"
            parts += _between("[INST]", content, "[/INST]")
    return parts


def _between(begin: str, text: str, end: str) -> list[str]:
    return [Control(begin), text, Control(end)]


def _merged(messages: Sequence[Message]) -> list[Message]:
    """Joins adjacent messages of the user, and of the assistant."""
    merged: list[Message] = []
    for message in messages:
        if merged and merged[-1].role == message.role != "tool":
            contents = [merged[-1].content, message.content]
            update = {
                "content": "\n\n".join(filter(None, contents)),
                "tool_calls": merged[-1].tool_calls + message.tool_calls,
            }
            merged[-1] = message.model_copy(update=update)
        else:
            merged.append(message)
    return merged


def _described(tool: Tool) -> dict[str, Any]:
    parameters = tool.parameters or {"type": "object", "properties": {}}
    return {"name": tool.name, "description": tool.description, "parameters": parameters}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": _parsed(call.arguments)}


def _parsed(text: str) -> Any:
    """Returns the value of a JSON text. Returns `text` unchanged if it is not JSON, or if it has
    the escape of a lone surrogate, which a prompt cannot contain.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if is_unicode(value) else text


def _mistral_id(call_id: str) -> str:
    """Returns the id in Mistral's form, nine letters and digits. Equal ids give equal results."""
    if _MISTRAL_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
