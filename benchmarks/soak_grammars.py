"""Ten minutes of mixed load with grammars: memory stays flat, and every request ends as it should.

    python -m benchmarks.soak_grammars --minutes 10 --save benchmarks/results/soak-grammars-cpu.json

The tiny model's server in this process, without Ray. Free answers, new schemas, regular
expressions, choices and tools (each a grammar that was never compiled before, so that compiled ones
are dropped all the time), one schema that many share, refused schemas and streams that the client
leaves are mixed at random. Fails if a request ends in another way than it should, if KV blocks stay
in use, or if the process has grown by more than 5 % since the second minute.
"""

import asyncio
import gc
import json
import random
import re
import sys
import time
from collections import Counter
from contextlib import aclosing
from typing import Any

import jsonschema
import psutil

from benchmarks.report import new_parser, publish, say
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings

OPEN_AT_ONCE = 16
MAX_GROWTH = 0.05
KV_CACHE_TOKENS = 32_768
"""Few, so that the prefix cache is full after two minutes: it takes memory until then."""
CACHED_TEXTS = 10_000
"""Texts whose merges tokenizers keeps, for the life of the tokenizer. They are filled first."""
MB = 1 << 20
SHARED = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def new_schema(rng: random.Random) -> dict[str, Any]:
    """Returns the schema of an object with fields that no other schema has."""
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 0, "maximum": rng.randint(1, 999)},
        {"type": "boolean"},
        {"enum": ["a", "b", rng.randint(1, 10**6)]},
        {"type": "string", "maxLength": rng.randint(1, 9)},
        {"type": "array", "items": {"type": "null"}, "maxItems": 3},
    ]
    names = [f"field{rng.randrange(10**9)}" for _ in range(rng.randint(1, 4))]
    fields = {name: rng.choice(kinds) for name in names}
    return {
        "type": "object",
        "properties": fields,
        "required": names,
        "additionalProperties": False,
    }


class Soak:
    """Requests of all kinds, and the number of each kind that ended."""

    def __init__(self, server: MixtralServer, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._server = server
        self._rng = random.Random(seed)
        self._kinds = {
            "free": self._free,
            "new schema": self._new_schema,
            "shared schema": self._shared_schema,
            "new regex": self._new_regex,
            "new choice": self._new_choice,
            "new tools": self._new_tools,
            "refused schema": self._refused,
            "left free": self._left_free,
            "left constrained": self._left_constrained,
        }

    async def client(self, end: float) -> None:
        """Sends one request after the other until the time `end`."""
        while time.monotonic() < end:
            kind = self._rng.choice(list(self._kinds))
            try:
                await self._kinds[kind]()
            except Exception as error:
                self.wrong.append(f"{kind}: {type(error).__name__}: {str(error)[:300]}")
            self.counts[kind] += 1

    async def _ask(self, **fields: Any) -> dict[str, Any]:
        """Returns the first choice of a chat completion; raises `RuntimeError` with an error."""
        question = f"{self._rng.randrange(10**6)}. Spell the word cat."
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 200, **fields}
        async with aclosing(self._server.call("POST", "/v1/chat/completions", body, "r1")) as items:
            async for item in items:
                if "error" in item:
                    raise RuntimeError(item["error"]["error"]["message"])
                answer: Any = item.get("body")
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    async def _free(self) -> None:
        choice = await self._ask(max_tokens=self._rng.randint(1, 60))
        assert choice["finish_reason"] in ("stop", "length")

    async def _new_schema(self) -> None:
        await self._held_to(new_schema(self._rng))

    async def _shared_schema(self) -> None:
        await self._held_to(SHARED)

    async def _held_to(self, schema: dict[str, Any]) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        choice = await self._ask(response_format=form)
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)

    async def _new_regex(self) -> None:
        pattern = f"{self._rng.randrange(10**9)}-[a-c]{{1,{self._rng.randint(2, 20)}}}"
        choice = await self._ask(structured_outputs={"regex": pattern})
        assert re.fullmatch(pattern, choice["message"]["content"])

    async def _new_choice(self) -> None:
        options = [f"option {self._rng.randrange(10**9)}" for _ in range(5)]
        choice = await self._ask(structured_outputs={"choice": options})
        assert choice["message"]["content"] in options

    async def _new_tools(self) -> None:
        schema = new_schema(self._rng)
        name = f"tool_{self._rng.randrange(10**9)}"
        tool = {"type": "function", "function": {"name": name, "parameters": schema}}
        mode = self._rng.choice(["required", "auto"])
        choice = await self._ask(tools=[tool], tool_choice=mode, parallel_tool_calls=False)
        if choice["finish_reason"] == "tool_calls":
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == name
            if mode == "required":
                jsonschema.validate(json.loads(call["function"]["arguments"]), schema)

    async def _refused(self) -> None:
        schema = {**new_schema(self._rng), "if": {}, "then": {"maxProperties": 1}}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        try:
            await self._ask(response_format=form)
        except RuntimeError as error:
            if "cannot be used" in str(error):
                return
            raise
        raise RuntimeError("a schema with `if` was taken")

    async def _left_free(self) -> None:
        await self._leave({})

    async def _left_constrained(self) -> None:
        schema = {"type": "array", "items": new_schema(self._rng), "minItems": 50}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        await self._leave({"response_format": form})

    async def _leave(self, fields: dict[str, Any]) -> None:
        """Closes a stream after some chunks."""
        body = {
            "messages": [{"role": "user", "content": "Go on and on."}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 1000,
            **fields,
        }
        left = self._rng.randint(1, 20)
        async with aclosing(self._server.call("POST", "/v1/chat/completions", body, "r1")) as items:
            async for item in items:
                if "error" in item:
                    raise RuntimeError(item["error"]["error"]["message"])
                left -= 1
                if left == 0:
                    return
        raise RuntimeError("a stream ended before its client left")


async def _blocks_are_free(server: MixtralServer) -> bool:
    """Returns whether the engine has freed all KV blocks within 10 s."""
    for _ in range(100):
        if server.inputs.engine.stats().num_used_blocks == 0:
            return True
        await asyncio.sleep(0.1)
    return False


async def soak(server: MixtralServer, minutes: float, seed: int) -> dict[str, Any]:
    """Returns the results; `wrong` is empty if there is no error."""
    load = Soak(server, seed)
    for number in range(CACHED_TEXTS):
        server.tokenizer.encode(f"{number}. What is the weather in Paris? Go on and on.")
    began = time.monotonic()
    clients = [asyncio.create_task(load.client(began + 60 * minutes)) for _ in range(OPEN_AT_ONCE)]
    rss: list[float] = []
    requests: list[int] = []
    processors: list[float] = []
    while any(not client.done() for client in clients):
        minute = (len(rss) + 1) * 60 - (time.monotonic() - began)
        await asyncio.wait(clients, timeout=minute)
        gc.collect()
        rss.append(round(psutil.Process().memory_info().rss / MB, 1))
        requests.append(load.counts.total())
        processors.append(round(time.process_time(), 1))
        say(f"minute {len(rss)}: {requests[-1]} requests, {rss[-1]} MB, {processors[-1]} s")
    await asyncio.gather(*clients)
    wrong = load.wrong
    if not await _blocks_are_free(server):
        wrong.append("KV blocks stay in use")
    if len(rss) > 2 and rss[-1] > rss[1] * (1 + MAX_GROWTH):
        wrong.append(f"memory has grown from {rss[1]} to {rss[-1]} MB since the second minute")
    return {
        "minutes": minutes,
        "seed": seed,
        "open_at_once": OPEN_AT_ONCE,
        "counts": dict(sorted(load.counts.items())),
        "rss_mb_at_each_minute": rss,
        "requests_at_each_minute": requests,
        "processor_s_at_each_minute": processors,
        "num_wrong": len(wrong),
        "wrong": wrong[:20],
    }


def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    model = {"name": "tiny", "quantization": "none", "device": "cpu"}
    server = MixtralServer(Settings(model=model, engine={"kv_cache_tokens": KV_CACHE_TOKENS}))
    figures = asyncio.run(soak(server, options.minutes, options.seed))
    server.close()
    publish("soak_grammars", figures, options.save)
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
