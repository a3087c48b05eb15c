"""Mistral's own encoder of conversations, with Mixtral 8x7B's tokenizer: the oracle for ids."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from serve_app.protocol.conversation import Turn
from serve_app.protocol.tools import Tool


@cache
def _encoder() -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.v1().instruct_tokenizer


@cache
def sentencepiece() -> Any:
    """Returns the SentencePiece model of Mixtral 8x7B."""
    from sentencepiece import SentencePieceProcessor

    from tools.mixtral_tokenizer import model_file

    return SentencePieceProcessor(model_file=str(model_file()))


def ids(messages: Sequence[Turn]) -> list[int]:
    """Returns the ids of a conversation. Takes it in any order, without the checks for what is
    usual."""
    from mistral_common.protocol.instruct.messages import (
        AssistantMessage,
        SystemMessage,
        UserMessage,
    )
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request: Any = ChatCompletionRequest(
        messages=[kinds[each["role"]](content=each["content"]) for each in messages]
    )
    normalized = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
    found: list[int] = _encoder().encode_instruct(normalized).tokens
    return found


@cache
def _tool_encoder() -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.v3(is_mm=False).instruct_tokenizer


def tool_ids(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[int]:
    """Returns the ids of a conversation with tools, by Mixtral 8x22B's encoder (v3)."""
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    functions = [
        {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters or {"type": "object", "properties": {}},
        }
        for tool in tools
    ]
    request: Any = ChatCompletionRequest(
        messages=list(messages),
        tools=[{"type": "function", "function": function} for function in functions],
    )
    normalized = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
    found: list[int] = _tool_encoder().encode_instruct(normalized).tokens
    return found
