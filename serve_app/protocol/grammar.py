"""Compiles grammars for a tokenizer with llguidance, and computes the tokens that they allow next.

llguidance (https://github.com/guidance-ai/llguidance) computes the allowed tokens of each position
from the grammar and the bytes of all tokens. A schema keyword that it does not support is an error.
"""

import asyncio
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import InvalidRequest
from serve_app.protocol import grammar_trial, tool_grammar
from serve_app.protocol.grammar_numbers import check_numbers
from serve_app.protocol.grammar_rules import rules
from serve_app.protocol.grammar_source import GrammarSource
from serve_app.protocol.large_stack import with_large_stack
from serve_app.protocol.unnamed_tokens import unnamed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer as Backend

NUM_KEPT = 32
"""Number of compiled grammars that are kept for later requests."""
MAX_ERROR_CHARS = 300
MAX_FORCED_TOKENS = 4
"""Maximum number of tokens with which a new grammar is tried."""


class GrammarState:
    """A `Constraint` of the engine: the state of the grammar after the tokens of one answer so
    far."""

    def __init__(self, matcher: "LLMatcher", stop_token_ids: Collection[int] = ()) -> None:
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids

    def fill(self, allowed: NDArray[np.int32]) -> None:
        """See `Constraint`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        # The tokenizer may have tokens beyond the model's vocabulary.
        allowed[:] = 0 if self.has_failed else mask[: len(allowed)]
        if self._stop_token_ids and self._matcher.is_accepting():
            for token_id in self._stop_token_ids:
                allowed.view(np.uint32)[token_id // 32] |= np.uint32(1 << token_id % 32)

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token_id)

    def allows_only(self, token_ids: Collection[int]) -> bool:
        """See `Constraint`."""
        allowed = _allowed_ids(self._matcher)
        return not self.has_failed and set(allowed) <= set(token_ids)

    @property
    def has_failed(self) -> bool:
        """See `Constraint`."""
        return self._matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """See `Constraint`."""
        return self._matcher.is_stopped() and not self.has_failed


class CompiledGrammar:
    """A `Grammar` of the engine."""

    def __init__(self, matcher: "LLMatcher", stop_token_ids: Collection[int] = ()) -> None:
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids

    def start(self) -> GrammarState:
        """Returns a new state before the first token. Copying it takes some microseconds."""
        return GrammarState(self._matcher.deep_copy(), self._stop_token_ids)

    def with_stops(self, stop_token_ids: Collection[int]) -> "CompiledGrammar":
        """Returns the same grammar with additional tokens that may end a complete answer."""
        return CompiledGrammar(self._matcher, stop_token_ids) if stop_token_ids else self


class GrammarCompiler:
    """Compiles grammars in threads of its own.

    Most take milliseconds. Those that may take seconds have other threads, so that a short grammar
    never waits for one.
    """

    def __init__(
        self,
        backend: "Backend",
        vocab_size: int,
        eos_token_ids: Collection[int],
        tool_calls_id: int | None = None,
    ) -> None:
        """`vocab_size` is the model's. `tool_calls_id` is the token that begins tool calls, if
        there is one.

        The tokenizer's data are prepared for the first grammar.
        """
        self._tool_calls_id = tool_calls_id
        self._backend = backend
        self._vocab_size = max(vocab_size, backend.get_vocab_size())
        # A tokenizer of llguidance needs an id for the end; without one no token ends an answer.
        self._eos_token_ids = sorted(eos_token_ids) or [self._vocab_size - 1]
        self._short = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._long = ThreadPoolExecutor(max_workers=2, thread_name_prefix="long-grammar")
        self._compiled = lru_cache(NUM_KEPT)(self._compile)

    async def compiled(self, source: GrammarSource, *, begins_text: bool) -> CompiledGrammar:
        """Returns the grammar of `source`.

        `begins_text` is False if the answer continues its prompt's text. Raises `InvalidRequest` if
        the grammar has an error or llguidance does not support it.
        """
        loop = asyncio.get_running_loop()
        threads = self._long if grammar_trial.is_needed(source) else self._short
        return await loop.run_in_executor(threads, self._compiled, source, begins_text)

    def _compile(self, source: GrammarSource, begins_text: bool) -> CompiledGrammar:
        return with_large_stack(lambda: self._compile_here(source, begins_text))

    def _compile_here(self, source: GrammarSource, begins_text: bool) -> CompiledGrammar:
        space = " " if begins_text and self._hides_first_space else ""
        if source.kind == "tools":
            grammars = tool_grammar.grammars(source, space, self._tool_calls_id)
        else:
            start = 'start: " " @answer' if space else "start: @answer"
            grammars = [{"lark_grammar": start}, {"name": "answer", **rules(source)}]
        check_numbers(grammars, source.field)
        if grammar_trial.is_needed(source) and not self._is_bounded(grammars):
            raise InvalidRequest(
                f"`{source.field}` takes too much time or memory to compile; send a simpler one.",
                param=source.field,
            )
        matcher = self._matcher(grammars)
        if matcher.is_error():
            raise self._refusal(source, matcher.get_error())
        if _fails_at_once(matcher):
            raise InvalidRequest(
                f"`{source.field}` matches nothing, or is too complex for this server; send a "
                "simpler one.",
                param=source.field,
            )
        return CompiledGrammar(matcher)

    def _is_bounded(self, grammars: list[dict[str, Any]]) -> bool:
        """Returns whether compiling `grammars` ends within the limits of a trial."""
        return grammar_trial.is_bounded(
            _encoded(grammars), self._tokenizer_json, self._vocab_size, self._eos_token_ids
        )

    def _refusal(self, source: GrammarSource, reason: str) -> InvalidRequest:
        """Returns the error for a grammar. It names the tool if a tool's schema is the cause."""
        field = source.field
        for name, schema in tool_grammar.schemas(source) if source.kind == "tools" else ():
            if (matcher := self._matcher([schema])).is_error():
                field, reason = name, matcher.get_error()
                break
        if "coerce_one_of" in reason:  # an option of llguidance, which makes an `anyOf` of it
            reason = "a value may match several schemas of a `oneOf`; use `anyOf`"
        # Otherwise llguidance's own words, on one line.
        why = " ".join(reason.split())[:MAX_ERROR_CHARS].rstrip(".")
        return InvalidRequest(f"`{field}` cannot be used: {why}.", param=field)

    def _matcher(self, grammars: list[dict[str, Any]]) -> "LLMatcher":
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, _encoded(grammars), log_level=0)

    @cached_property
    def _tokenizer_json(self) -> str:
        return unnamed(self._backend.to_str())

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        # Mixtral's takes 0.2 s.
        return LLTokenizer(
            self._tokenizer_json, n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )

    @cached_property
    def _hides_first_space(self) -> bool:
        """Whether the first token of a text begins with a space that the text does not have.

        This is so for SentencePiece's tokenizers, and the model expects the space after a question.
        """
        for token_id in range(self._vocab_size):
            text = self._tokenizer.decode_bytes([token_id])
            if len(text) > 1 and text[:1] == b" " and text[1:2].isalpha():
                return not str(self._backend.decode([token_id])).startswith(" ")
        return False


def _encoded(grammars: list[dict[str, Any]]) -> str:
    """Returns grammars in the form that `LLMatcher` takes."""
    return json.dumps({"grammars": grammars})


def _fails_at_once(matcher: "LLMatcher") -> bool:
    """Returns whether llguidance gives up on the tokens that every answer begins with.

    Such a request would fail after its prompt, and in a stream after its first chunk.
    """
    matcher = matcher.deep_copy()
    for _ in range(MAX_FORCED_TOKENS):
        allowed = _allowed_ids(matcher)
        if matcher.is_error():
            return True
        if len(allowed) != 1 or matcher.is_stopped():
            return False
        matcher.consume_token(allowed[0])
    return matcher.is_error()


def _allowed_ids(matcher: "LLMatcher") -> list[int]:
    """Returns the ids of the tokens that may come next."""
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed: list[int] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
    return allowed
