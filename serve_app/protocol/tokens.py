"""`/tokenize` and `/detokenize`, in vLLM's schema. Knows no tokenizer."""

from typing import Any

from pydantic import Field, model_validator

from serve_app.errors import InvalidRequest
from serve_app.protocol.fields import Body
from serve_app.protocol.messages import Conversation

MAX_TOKENS = 100_000


class TokenizeRequest(Body):
    """`POST /tokenize` of `prompt` (raw text) or `messages` (through the chat template)."""

    prompt: str | None = None
    messages: Conversation | None = None
    add_special_tokens: bool = True
    """BOS before a `prompt`; the chat template brings its own."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _prompt_or_messages(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
        useless = "add_generation_prompt" if self.messages is None else "add_special_tokens"
        if useless in self.model_fields_set:
            raise InvalidRequest(
                f"`{useless}` does nothing for `{'prompt' if self.messages is None else 'messages'}"
                "`; leave it out.",
                param=useless,
            )
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize` of token ids."""

    tokens: list[int] = Field(max_length=MAX_TOKENS)


def tokenized(ids: list[int], max_model_len: int, strings: list[str] | None) -> dict[str, Any]:
    """The answer of `/tokenize`; `token_strs` is null unless asked for."""
    return {
        "count": len(ids),
        "max_model_len": max_model_len,
        "tokens": ids,
        "token_strs": strings,
    }
