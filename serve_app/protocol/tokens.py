"""`/tokenize` and `/detokenize`: requests and responses, in vLLM's schema."""

from typing import Any

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.field_types import Integer, Text
from serve_app.protocol.fields import Body
from serve_app.protocol.messages import Conversation
from serve_app.protocol.tool_request import FunctionTool

MAX_TOKENS = 100_000


class TokenizeRequest(Body):
    """`POST /tokenize` of `prompt` (raw text) or `messages` (through the chat template)."""

    prompt: Text | None = None
    messages: Conversation | None = None
    add_special_tokens: bool | None = None
    """Whether BOS goes before a `prompt` (default: yes); the chat template has its own."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """As in chat completions."""
    return_token_strs: bool = False
    tools: list[FunctionTool] = Field(default_factory=list)
    """With `messages`: the tools that an answer could call."""

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidRequest(
                "The chat template brings its own special tokens; leave `add_special_tokens` out.",
                param="add_special_tokens",
            )
        for field in ("add_generation_prompt", "continue_final_message"):
            if self.prompt is not None and field in self.model_fields_set:
                raise InvalidRequest(
                    f"`{field}` does nothing for `prompt`; leave it out.", param=field
                )
        if self.prompt is not None and self.tools:
            raise InvalidRequest("`tools` does nothing for `prompt`; leave it out.", param="tools")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize` of token ids."""

    tokens: list[Integer] = Field(max_length=MAX_TOKENS)


def tokenized(ids: list[int], max_model_len: int, strings: list[str] | None) -> dict[str, Any]:
    """Returns the response of `/tokenize`; `strings` is None if the client did not ask for them."""
    return {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }
