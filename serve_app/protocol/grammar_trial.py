"""Compiles a grammar in a process of its own first, with limits on its time and memory.

llguidance limits its work between two steps, not within one. A regular expression of 20,000
optional characters takes seconds and gigabytes, and one of 50,000 ends the process for lack of
memory; 150 `pattern`s in an `allOf` take minutes. Most grammars are short and without many
patterns. They take at most half a second, and are not tried.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from serve_app.protocol.large_stack import STACK_BYTES, with_large_stack

if TYPE_CHECKING:  # a trial should start fast
    from serve_app.protocol.grammar_source import GrammarSource

MAX_UNTRIED_CHARS = 3000
MAX_UNTRIED_PATTERNS = 2
"""Length, and number of `pattern` and `patternProperties`, of a grammar that is not tried."""
MAX_CPU_S = 2
"""Processor time of a trial. Its start takes 0.3 s of it."""
MAX_BYTES = STACK_BYTES + 1024**3
"""Address space of a trial. Its start takes half a gigabyte of it, besides the stack."""
MAX_WAIT_S = 60
"""Time after which a trial ends even if the machine was too busy for it."""


def is_needed(source: "GrammarSource") -> bool:
    """Returns whether compiling `source` may take more than half a second."""
    answer = json.loads(source.text)["answer"] if source.kind == "tools" else None
    return (
        "lark" in (source.kind, answer and answer[0])
        or len(source.text) > MAX_UNTRIED_CHARS
        or source.text.count('"pattern') > MAX_UNTRIED_PATTERNS
    )


def is_bounded(
    grammar: str, tokenizer: str, vocab_size: int, eos_token_ids: Collection[int]
) -> bool:
    """Returns whether llguidance compiles or refuses `grammar` within the limits.

    `grammar` is in llguidance's form; the other parameters are those of its tokenizer.
    """
    text = json.dumps([grammar, tokenizer, vocab_size, list(eos_token_ids)])
    # The path of this process, because Ray may have added folders to it.
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    try:
        tried = subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=text.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=MAX_WAIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    if tried.returncode > 0:  # a signal would be negative
        raise RuntimeError(f"The trial of a grammar ended with exit code {tried.returncode}.")
    return tried.returncode == 0


def main() -> None:
    """Compiles the grammar of the standard input. A signal ends the process at its limits."""
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from llguidance import LLMatcher, LLTokenizer

    grammar, tokenizer, vocab_size, eos_token_ids = json.load(sys.stdin)
    table = LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos_token_ids)
    with_large_stack(lambda: LLMatcher(table, grammar, log_level=0))
