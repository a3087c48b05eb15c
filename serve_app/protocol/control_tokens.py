"""ControlTokens: keeps a user's text from becoming control tokens, so that a typed `</s>` is text.

A mark is inserted into each control token in a text, so that the tokenizer does not recognize the
token. The tokenizer's normalizer removes the mark again, so the ids are those of plain text.
"""

import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve_app.protocol.conversation import Turn

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

_KEPT_MARK = "\u200b"
"""A zero-width space, which the normalizer cannot remove. It is used for tokens that the tokenizer
recognizes after normalizing, or that merges of the vocabulary can produce."""


class ControlTokens:
    """The control tokens of a tokenizer. The constructor adds a step to the tokenizer's normalizer.

    As in transformers' `sanitize_control_tokens`, control tokens are the special tokens and the
    added tokens that occur in the chat template.
    """

    def __init__(self, backend: "Tokenizer", template_literals: str) -> None:
        self._backend = backend
        # The mark is random, so that no text contains it.
        mark = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
        _remove_from_text(backend, mark)
        self._marks: dict[str, str] = {}
        for token_id, token in backend.get_added_tokens_decoder().items():
            if _is_control(token, template_literals):
                self._marks[token.content] = self._working_mark(token_id, token.content, mark)
        longest_first = "|".join(sorted(map(re.escape, self._marks), key=len, reverse=True))
        self.find = re.compile(longest_first or "(?!)").search
        """Finds the first control token in a text. Returns None if there is none."""
        # The look-ahead finds every beginning of a token, even inside another token.
        self._beginning = re.compile(f"(?=({longest_first}))(.)", re.DOTALL)

    @property
    def unbreakable(self) -> list[str]:
        """Control tokens that a user's text can still produce."""
        return [token for token, mark in self._marks.items() if not mark]

    def marked(self, messages: Sequence[Turn]) -> Sequence[Turn]:
        """Returns `messages` with a mark in each control token of their contents."""
        return [
            {**message, "content": self.marked_text(message["content"])} for message in messages
        ]

    def marked_text(self, text: str) -> str:
        """Returns `text` with a mark in each control token."""
        return self._beginning.sub(self._with_mark, text)

    def _with_mark(self, match: re.Match[str]) -> str:
        return match[2] + self._marks[match[1]]

    def _working_mark(self, token_id: int, token: str, mark: str) -> str:
        for candidate in (mark, _KEPT_MARK):
            marked = self._backend.encode(
                token[0] + candidate + token[1:], add_special_tokens=False
            )
            if token_id not in marked.ids:
                return candidate
        return ""


def _is_control(token: "AddedToken", template_literals: str) -> bool:
    is_in_template = token.content in template_literals and not token.content.isspace()
    return token.special or is_in_template


def _remove_from_text(backend: "Tokenizer", mark: str) -> None:
    from tokenizers import normalizers

    remove = normalizers.Replace(mark, "")
    before = backend.normalizer
    backend.normalizer = remove if before is None else normalizers.Sequence([remove, before])
