"""Compiles grammars for a tokenizer, with llguidance, and says which tokens they allow next.

llguidance (https://github.com/guidance-ai/llguidance) computes the allowed tokens of each position
from the grammar and the bytes of all tokens. A schema keyword that it cannot hold is an error.
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
from serve_app.protocol.grammar_source import GrammarSource
from serve_app.protocol.one_of import as_any_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from tokenizers import Tokenizer as Backend

NUM_KEPT = 32
"""Compiled grammars that are kept for later requests."""
JSON_OPTIONS = {
    # Without a limit a model may write spaces until its answer is cut.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}",
}
MAX_ERROR_CHARS = 300


class GrammarState:
    """A `Constraint` of the engine: the grammar behind the tokens of one answer so far."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def fill(self, allowed: NDArray[np.int32]) -> None:
        """See `Constraint`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        # The tokenizer may have tokens beyond the model's vocabulary.
        allowed[:] = 0 if self.has_failed else mask[: len(allowed)]

    def accept(self, token_id: int) -> None:
        """See `Constraint`."""
        self._matcher.consume_token(token_id)

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

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def start(self) -> GrammarState:
        """The state before the first token; a copy takes some microseconds."""
        return GrammarState(self._matcher.deep_copy())


class GrammarCompiler:
    """Compiles one grammar after the other, in a thread of its own."""

    def __init__(self, backend: "Backend", vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size` is the model's. Nothing is prepared before the first grammar comes."""
        self._backend = backend
        self._vocab_size = max(vocab_size, backend.get_vocab_size())
        # A tokenizer of llguidance needs an id for the end; without one no token ends an answer.
        self._eos_token_ids = sorted(eos_token_ids) or [self._vocab_size - 1]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._compiled = lru_cache(NUM_KEPT)(self._compile)

    async def compiled(self, source: GrammarSource, *, begins_text: bool) -> CompiledGrammar:
        """The grammar of `source`; `begins_text`: the answer does not continue its prompt's text.

        Raises `InvalidRequest` for a grammar that has an error or that llguidance cannot hold.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compiled, source, begins_text)

    def _compile(self, source: GrammarSource, begins_text: bool) -> CompiledGrammar:
        from llguidance import LLMatcher

        answer = {"name": "answer", **_rules(source)}
        first = '" " @answer' if begins_text and self._hides_first_space else "@answer"
        grammar = {"grammars": [{"lark_grammar": f"start: {first}"}, answer]}
        matcher = LLMatcher(self._tokenizer, json.dumps(grammar), log_level=0)
        if matcher.is_error():
            raise _refusal(source, matcher.get_error())
        return CompiledGrammar(matcher)

    @cached_property
    def _tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        # Mixtral's takes about a second.
        return LLTokenizer(
            self._backend.to_str(), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
        )

    @cached_property
    def _hides_first_space(self) -> bool:
        """Whether the first token of a text begins with a space that the text does not have.

        SentencePiece's tokenizers do so, and the model expects it after a question.
        """
        for token_id in range(self._vocab_size):
            text = self._tokenizer.decode_bytes([token_id])
            if len(text) > 1 and text[:1] == b" " and text[1:2].isalpha():
                return not str(self._backend.decode([token_id])).startswith(" ")
        return False


def _rules(source: GrammarSource) -> dict[str, Any]:
    """The grammar in llguidance's own form, without a name."""
    if source.kind == "json":
        schema = json.loads(source.text)
        # `true` and `false` are schemas, too: any value, and none.
        schema = {"allOf": [schema]} if isinstance(schema, bool) else schema
        return {"json_schema": {**as_any_of(schema), "x-guidance": JSON_OPTIONS}}
    if source.kind == "regex":
        from llguidance import LLMatcher

        rules: dict[str, Any] = json.loads(LLMatcher.grammar_from_regex(source.text))
        return {"lark_grammar": rules["grammars"][0]["lark_grammar"]}
    if source.kind == "choice":
        choices = " | ".join(json.dumps(each) for each in json.loads(source.text))
        return {"lark_grammar": f"start: {choices}"}
    return {"lark_grammar": source.text}


def _refusal(source: GrammarSource, reason: str) -> InvalidRequest:
    if "coerce_one_of" in reason:  # an option of llguidance, which would make an `anyOf` of it
        reason = "a value may match several schemas of a `oneOf`; use `anyOf`"
    # Otherwise llguidance's own words, on one line.
    why = " ".join(reason.split())[:MAX_ERROR_CHARS].rstrip(".")
    return InvalidRequest(f"`{source.field}` cannot be used: {why}.", param=source.field)
