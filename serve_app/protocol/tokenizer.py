"""The checkpoint's tokenizer and chat template: text and messages to token ids, and back.

Wraps transformers' tokenizer. The chat format and its BOS come from the checkpoint's template.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serve_app.errors import InvalidRequest
from serve_app.protocol.text import Detokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Reads `tokenizer.json`, its configuration and the chat template in the folder `path`.

    Thread-safe: it is only read after construction.
    """

    def __init__(self, path: str | Path) -> None:
        # AutoTokenizer chooses this class for every Mixtral checkpoint, but imports the
        # configurations of all models first, and chooses another where mistral-common is installed.
        from transformers import PreTrainedTokenizerFast

        self._tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            str(path), local_files_only=True
        )
        self.backend: Any = self._tokenizer.backend_tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has one; without it `render` refuses every conversation."""
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with one BOS in front, even where the text begins with one."""
        # A batch of one: unlike `encode`, it releases the interpreter's lock.
        (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        bos = self._tokenizer.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def render(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation (`{"role", "content"}` each) in the model's chat format.

        Raises `InvalidRequest` with the template's own sentence where it refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        if self._tokenizer.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise InvalidRequest(str(error), param="messages") from None
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(
        self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A decoder for one answer; `prompt_ids` where it continues the prompt's text."""
        return Detokenizer(self.backend, prompt_ids=prompt_ids, skip_special=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; a byte token may be a part of a character."""
        token: str | None = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def token_string(self, token_id: int) -> str:
        """The spelling of a token in the vocabulary, such as `▁Hello` or `<0x0A>`."""
        return self.backend.id_to_token(token_id) or ""
