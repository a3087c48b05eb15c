"""Tokenizer: the checkpoint's tokenizer and chat template."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import InvalidRequest
from serve_app.protocol import tokenizer_files
from serve_app.protocol.chat_template import ChatTemplate, cut_behind
from serve_app.protocol.control_tokens import ControlTokens
from serve_app.protocol.conversation import Turn
from serve_app.protocol.tool_calls import MARKER
from serve_app.protocol.tool_prompt import MISTRAL_TOKENS, Control, mistral_parts, plain_turns
from serve_app.protocol.tools import Tool

if TYPE_CHECKING:
    from serve_app.protocol.messages import Message

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """The tokenizer and the chat template in the folder `path`.

    With `sanitize_control_tokens`, control tokens in the content of messages are text.
    `custom_chat_template`, the path or the text of a template, replaces the checkpoint's. The
    constructor raises `ModelLoadFailed` if files cannot be read or the chat template does not work.
    Thread-safe, because an instance never changes.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sanitize_control_tokens: bool = True,
        custom_chat_template: str | None = None,
    ) -> None:
        files = tokenizer_files.read(Path(path), custom_chat_template)
        self._has_custom_template = custom_chat_template is not None
        self.backend: Any = files.backend
        self.info = files.info
        """The tokenizer's configuration, as JSON values."""
        self._is_sentencepiece = files.is_sentencepiece
        self._template: ChatTemplate | None = None
        if files.chat_template is not None:
            self._template = ChatTemplate(
                files.chat_template, files.special_tokens, files.template_file
            )
        self._control_tokens: ControlTokens | None = None
        if sanitize_control_tokens:
            literals = "" if self._template is None else self._template.literals
            self._control_tokens = ControlTokens(self.backend, literals)
        self._special_tokens = files.special_tokens
        self.tool_calls_id = self._find_tool_calls_id()
        """The token with which the model begins tool calls; None if it was not trained for
        tools."""
        # A cache, because answers with log probabilities need the same tokens often.
        self._token_bytes: dict[int, bytes] = {}
        self.bos_token_id = self._special_id(files.special_tokens, "bos_token")
        self.eos_token_id = self._special_id(files.special_tokens, "eos_token")

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template. Without one, `render` refuses every
        conversation."""
        return self._template is not None

    @property
    def notes(self) -> list[str]:
        """Notes for users about the tokenizer, one phrase each."""
        notes = []
        if self._is_sentencepiece:
            notes.append("no tokenizer.json: the tokenizer is made from tokenizer.model")
        if self.tool_calls_id is not None:
            notes.append("tools are written with the checkpoint's own tool tokens")
        if self._has_custom_template:
            notes.append("the chat template is that of `model.custom_chat_template`")
        if self._template is None:
            notes.append("no chat template in the checkpoint: only /v1/completions answers")
        elif not self._template.takes_system:
            notes.append(
                "no system messages in the chat template: they go before the first question"
            )
        if self._control_tokens is None:
            notes.append("control tokens that messages contain are control tokens, not text")
        elif unbreakable := self._control_tokens.unbreakable:
            notes.append(f"control tokens that the tokenizer finds in any text: {unbreakable}")
        return notes

    def first_unknown(self, token_ids: Sequence[int], vocab_size: int) -> str | None:
        """Returns the first token in `token_ids` that is not in a vocabulary of `vocab_size`
        tokens.

        Fine-tuning often adds tokens only to the tokenizer, such as `[PAD]`. Ids that are no tokens
        of the tokenizer are ignored.
        """
        tokens = (
            self.backend.id_to_token(token_id) for token_id in token_ids if token_id >= vocab_size
        )
        return next((token for token in tokens if token is not None), None)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of `text` with one BOS at the beginning, even if `text` begins with a
        BOS."""
        if self._is_sentencepiece and text[:1] in (" ", "▁"):
            # SentencePiece puts a space before every text, `tokenizers` only if there is none.
            text = f"▁{text}"
        # A batch of one: unlike `encode`, it releases the interpreter's lock.
        (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and ids[:2] == [bos, bos]:
            return ids[1:]
        return ids

    def render(
        self,
        messages: Sequence[Turn],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the ids of a conversation in the model's chat format.

        With `continue_final_message` the prompt ends with the text of the last message. Raises
        `InvalidRequest`, with the template's own sentence, if it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        controls = self._control_tokens
        if controls is not None and any(controls.find(message["content"]) for message in messages):
            messages = controls.marked(messages)
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        if continue_final_message:
            text = cut_behind(text, messages[-1]["content"])
        (encoded,) = self.backend.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = encoded.ids
        return ids

    def render_with_tools(
        self,
        messages: Sequence["Message"],
        tools: Sequence[Tool],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Returns the ids of a conversation with tools, calls or results; see `tool_prompt`.

        Raises the errors of `render`.
        """
        if self.tool_calls_id is None:
            turns = plain_turns(messages, tools)
            return self.render(
                turns,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        parts = mistral_parts(messages, tools, self._special_tokens)
        if continue_final_message and parts[-1] == self._special_tokens.get("eos_token"):
            parts = parts[:-1]
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Control):
                ids.append(self.backend.token_to_id(part))
            elif part:
                ids += self._text_ids(part)
        return ids

    def _text_ids(self, text: str) -> list[int]:
        """Returns the ids of a client's text, equal to those of SentencePiece."""
        if self._control_tokens is not None:
            text = self._control_tokens.marked_text(text)
        if text[0] == " " and self.encode(" a") == self.encode("a"):
            text = f"▁{text}"
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `token_ids`."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one token, which may be a part of a character."""
        token = self._token_bytes.get(token_id)
        if token is None:
            token = self._token_bytes[token_id] = self._bytes_of(token_id)
        return token

    def _bytes_of(self, token_id: int) -> bytes:
        token: str | None = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("▁", " ").encode()

    def token_string(self, token_id: int) -> str:
        """Returns the spelling of a token in the vocabulary, such as `▁Hello` or `<0x0A>`."""
        return self.backend.id_to_token(token_id) or ""

    def _find_tool_calls_id(self) -> int | None:
        has_names = {"bos_token", "eos_token"} <= self._special_tokens.keys()
        if self._template is None or MARKER not in self._template.literals or not has_names:
            return None
        ids = [self.backend.token_to_id(token) for token in MISTRAL_TOKENS]
        return None if None in ids else self.backend.token_to_id(MARKER)

    def _special_id(self, special_tokens: dict[str, str], name: str) -> int | None:
        token = special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)
