"""Detokenizer: converts token ids to text one by one, and returns only complete characters."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from serve_app.protocol.tool_calls import MARKER

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

PRIMING_TOKENS = 8
"""Number of prompt tokens that the decoder processes first, so that a continuation keeps its
leading space."""


class Detokenizer:
    """Incremental decoding with tokenizers' `DecodeStream`, which withholds incomplete characters.

    `prompt_ids` is the prompt if the answer continues its text. Without it, the answer begins a new
    text, and SentencePiece's leading space is dropped. The token `tool_calls_id` is shown as
    `MARKER`, even with `skip_special`.
    """

    def __init__(
        self,
        backend: "Backend",
        *,
        prompt_ids: Sequence[int] = (),
        skip_special: bool = True,
        tool_calls_id: int | None = None,
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend = backend
        self._tool_calls_id = tool_calls_id
        self._skip_special = skip_special
        self._pending: list[int] = []
        self._new_stream = partial(DecodeStream, skip_special_tokens=skip_special)
        """Returns a new stream that has processed the given ids."""
        self._stream = self._new_stream(ids=_tail(backend, prompt_ids) if prompt_ids else [])

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes; empty while a character is incomplete."""
        if token_id == self._tool_calls_id:
            before = self.flush()
            self._stream = self._new_stream(ids=[])
            return before + MARKER
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._backend, token_id)
        except Exception:
            # The bytes are not UTF-8, so DecodeStream fails with "Invalid prefix".
            pending = self._pending
            text = self.flush()
            self._stream = self._new_stream(ids=pending)
        if text is None:
            return ""
        self._pending = []
        return str(text)

    def flush(self) -> str:
        """Returns the remaining text. An incomplete character becomes U+FFFD."""
        rest, self._pending = self._pending, []
        if not rest:
            return ""
        return str(self._backend.decode(rest, skip_special_tokens=self._skip_special))


def _tail(backend: "Backend", prompt_ids: Sequence[int]) -> list[int]:
    """Returns the last ids of the prompt; none if their text ends in an incomplete character.

    DecodeStream would return a prompt's text that ends in U+FFFD as if it were new.
    """
    # A character has up to 4 bytes, each a token: one of the 4 tails begins at a character.
    for num_tokens in range(PRIMING_TOKENS, PRIMING_TOKENS + 4):
        tail = list(prompt_ids[-num_tokens:])
        if not backend.decode(tail, skip_special_tokens=True).endswith("\ufffd"):
            return tail
    return []
