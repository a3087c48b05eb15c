"""Measures the cost of grammars: time per token with and without them, and time of one mask.

    python -m benchmarks.constrained --save benchmarks/results/constrained-cpu.json

Rounds of free and of constrained answers take turns in one process, around the tiny model on a CPU,
which computes a step in a fraction of the time that a real model takes: the ratio is the worst
case. The parts of a mask's cost are measured with Mixtral's own tokenizer (32,000 entries).
Processor time stands beside elapsed time, because the machine may be shared.
"""

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.report import new_parser, publish, say
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.engine.token_mask import TokenMask
from serve_app.protocol import sentencepiece_model
from serve_app.protocol.grammar import GrammarCompiler, GrammarState
from serve_app.protocol.grammar_source import schema_source
from tools import mixtral_tokenizer

STREAMS = 16
TOKENS = 128
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}},
    },
    "required": ["name", "age", "unit", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 200}
"""Its shortest answer is longer than `TOKENS`."""


def _body(seed: int, temperature: float, *, is_constrained: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{seed}. Say it."}],
        "max_tokens": TOKENS,
        "temperature": temperature,
        "seed": seed,
        "ignore_eos": True,
    }
    if is_constrained:
        schema = {"name": "list", "schema": SCHEMA}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


async def _answer(server: MixtralServer, body: dict[str, Any]) -> None:
    async for item in server.call("POST", "/v1/chat/completions", body, "r1"):
        answer: Any = item.get("body")
        assert answer["choices"][0]["finish_reason"] == "length", item


def _round(server: MixtralServer, bodies: list[dict[str, Any]]) -> tuple[float, float]:
    """Returns the microseconds per token of answers side by side, elapsed and of processors."""

    async def run() -> None:
        await asyncio.gather(*(_answer(server, body) for body in bodies))

    began, used = time.perf_counter(), time.process_time()
    asyncio.run(run())
    elapsed, processors = time.perf_counter() - began, time.process_time() - used
    num_tokens = len(bodies) * TOKENS
    return elapsed / num_tokens * 1e6, processors / num_tokens * 1e6


def streams(server: MixtralServer, temperature: float, repeats: int) -> dict[str, Any]:
    """Returns microseconds per token of free, constrained and mixed batches, and their ratios."""
    kinds = {"free": 0, "mixed": STREAMS // 2, "constrained": STREAMS}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):
        for kind, num_constrained in kinds.items():
            bodies = [
                _body(seed, temperature, is_constrained=seed < num_constrained)
                for seed in range(STREAMS)
            ]
            cost = _round(server, bodies)
            if repeat:  # the first round compiles the grammar
                found[kind].append(cost)
    figures: dict[str, Any] = {}
    for index, name in enumerate(("elapsed", "processors")):
        us = {kind: statistics.median(cost[index] for cost in found[kind]) for kind in kinds}
        figures[f"{name}_us"] = {kind: round(value, 1) for kind, value in us.items()}
        pairs = zip(found["constrained"], found["free"], strict=True)
        ratio = statistics.median(one[index] / other[index] for one, other in pairs)
        figures[f"{name}_ratio"] = round(ratio, 3)
    return figures


class Walk:
    """`STREAMS` answers to `SCHEMA` that take random tokens of those that are allowed."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._grammar = asyncio.run(compiler.compiled(schema_source(SCHEMA, "s"), begins_text=True))
        self._random = np.random.default_rng(0)
        self.states: list[GrammarState] = [self._grammar.start() for _ in range(STREAMS)]
        self._num_tokens = 0

    def advance(self) -> None:
        """Appends one token to each answer; begins new ones after 60 tokens."""
        self._num_tokens += 1
        if self._num_tokens % 60 == 0:
            self.states = [self._grammar.start() for _ in range(STREAMS)]
            return
        allowed = np.zeros(1000, np.int32)
        for state in self.states:
            state.fill(allowed)
            bits = np.unpackbits(allowed.view(np.uint8), bitorder="little")
            state.accept(int(self._random.choice(np.flatnonzero(bits))))


def masks(steps: int) -> dict[str, float]:
    """Returns the microseconds per row of a mask, median over `steps` with `STREAMS` rows."""
    from llguidance import LLExecutor
    from llguidance.numpy import fill_next_token_bitmask_par

    torch.set_num_threads(1)
    backend = sentencepiece_model.read(mixtral_tokenizer.model_file())
    walk = Walk(GrammarCompiler(backend, 32_000, [2]))
    executors = {count: LLExecutor(count) for count in (1, 2)}
    allowed = np.zeros((STREAMS, 1000), np.int32)
    logits = torch.randn(STREAMS, 32_000)

    def one_by_one() -> None:
        for row, state in zip(allowed, walk.states, strict=True):
            state.fill(row)

    def in_parallel(count: int) -> Callable[[], None]:
        def fill() -> None:
            matchers = [(state._matcher, row) for row, state in enumerate(walk.states)]
            fill_next_token_bitmask_par(executors[count], matchers, allowed)

        return fill

    def filled_and_applied() -> None:
        TokenMask(dict(enumerate(walk.states))).apply(logits)

    works = {
        "fill": one_by_one,
        "fill, executor of 1 thread": in_parallel(1),
        "fill, executor of 2 threads": in_parallel(2),
        "fill and apply": filled_and_applied,
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    order = np.random.default_rng(1)
    for _ in range(steps):
        name = str(order.choice(list(works)))  # each step has one: a second fill is faster
        began = time.perf_counter()
        works[name]()
        taken[name].append(time.perf_counter() - began)
        walk.advance()
    return {name: round(statistics.median(each) / STREAMS * 1e6, 1) for name, each in taken.items()}


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1600)
    options = parser.parse_args()
    figures: dict[str, Any] = {"streams": STREAMS, "tokens": TOKENS}
    figures["us_per_row_of_a_mask"] = masks(options.steps)
    say(figures)
    server = MixtralServer(
        Settings(model={"name": "tiny", "quantization": "none", "device": "cpu"})
    )
    for name, temperature in (("temperature 1", 1.0), ("greedy", 0.0)):
        figures[name] = streams(server, temperature, options.repeats)
        say(name, figures[name])
    server.close()
    publish("constrained", figures, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
