"""The road from the model to the client: what a streamed token costs when the model costs nothing.

    python -m benchmarks.road --save benchmarks/results/road-cpu.json

The deployment with a null model (`null_server`), 5 ms a step. `http`: through Ray Serve, as
clients come: tokens per second as a share of what the steps allow (streams / 5 ms), and processor
time per token of the replica, of the proxy and of the rest of Ray; with Serve's own proxy and in
its HAProxy mode. `alone`: the same without Ray in one process, part by part. The load generator has
the same cores and is counted apart.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import yaml

from benchmarks.cpu_time import seconds_by_part
from benchmarks.load import closed_loop
from benchmarks.machine import describe, publish
from benchmarks.null_server import STEP_S, NullRunner, load
from benchmarks.peer_process import free_port, serving
from benchmarks.peer_servers import HAPROXY
from benchmarks.waiting import summarise
from serve_app.api.ingress import create_app
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.protocol import sse
from serve_app.protocol.call import Call, StreamReply

ROOT = Path(__file__).parents[1]
STREAMS = (1, 16, 32)
MAX_NUM_SEQS = 64
MODES: dict[str, dict[str, str]] = {
    "proxy": {},
    "haproxy": HAPROXY,
}
"""How Serve brings requests to the replica, by the environment that says so."""


def body(num_tokens: int) -> dict[str, Any]:
    """A streamed completion, as `/v1/completions` takes it."""
    return {
        "model": "tiny",
        "prompt": "Say it.",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# In one process, without Ray.


class Alone:
    """One server, and consumers who go with a token as far as some part of the road."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        settings = Settings(
            model={"name": "tiny", "quantization": "none"}, engine={"max_num_seqs": MAX_NUM_SEQS}
        )
        self._loaded: Loaded | None = None
        self.server = MixtralServer(settings, self._load)
        self._app = create_app(lambda: self.server)
        self.parts: dict[str, Callable[[], Awaitable[None]]] = {
            "engine": self._tokens,
            "text and chunks": self._chunks,
            "events": self._events,
            "ingress": self._responses,
        }
        """Each goes a part further than the one before."""

    def _load(self, settings: Settings, load_log: LoadLog) -> Loaded:
        self._loaded = load(settings, load_log)
        return self._loaded

    @property
    def engine(self) -> Engine:
        assert self._loaded is not None
        return self._loaded.engine

    @property
    def runner(self) -> NullRunner:
        runner = self.engine._core._runner
        assert isinstance(runner, NullRunner)
        return runner

    async def _tokens(self) -> None:
        params = SamplingParams(self._num_tokens, temperature=0.0, ignore_eos=True)
        async for _ in self.engine.generate([5, 6, 7], params):
            pass

    async def _reply(self) -> StreamReply:
        call = Call("POST", "/v1/completions", body(self._num_tokens), "r1")
        reply = await self.server.answer(call)
        assert isinstance(reply, StreamReply)
        return reply

    async def _chunks(self) -> None:
        async with aclosing((await self._reply()).rest) as chunks:
            async for _ in chunks:
                pass

    async def _events(self) -> None:
        reply = await self._reply()
        sse.event(reply.first)
        async with aclosing(reply.rest) as chunks:
            async for chunk in chunks:
                sse.event(chunk)

    async def _responses(self) -> None:
        content = json.dumps(body(self._num_tokens)).encode()
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
            "asgi": {"version": "3.0"},
        }
        await self._app(scope, receive, send)

    def cost(self, part: str, streams: int) -> tuple[float, float]:
        """Microseconds a token: of the whole process, and of the engine's thread alone."""

        async def run() -> None:
            await asyncio.gather(*(self.parts[part]() for _ in range(streams)))

        own, began = self.runner.thread_s, time.process_time()
        asyncio.run(run())
        took, own = time.process_time() - began, self.runner.thread_s - own
        num_tokens = streams * self._num_tokens
        return took / num_tokens * 1e6, own / num_tokens * 1e6


def alone(num_tokens: int, rounds: int) -> dict[str, Any]:
    """Microseconds of processor time per token up to each part of the road."""
    bench = Alone(num_tokens)
    found: dict[str, Any] = {}
    for streams in STREAMS:
        costs: dict[str, float] = {}
        for part in bench.parts:
            runs = [bench.cost(part, streams) for _ in range(rounds)]
            costs[part] = round(statistics.median(run[0] for run in runs), 1)
            costs.setdefault("engine's thread", round(statistics.median(r[1] for r in runs), 1))
        found[str(streams)] = costs
        print(f"alone, {streams:>2} streams: {costs} us a token", flush=True)
    bench.server.close()
    return found


# Through Ray Serve.


def config(port: int) -> dict[str, Any]:
    """What `serve run` takes: `configs/tiny.yaml` with the null model."""
    text = (ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8")
    document: dict[str, Any] = yaml.safe_load(text)
    document["http_options"]["port"] = port
    application = document["applications"][0]
    application["import_path"] = "benchmarks.null_server:build_app"
    application["args"]["engine"]["max_num_seqs"] = MAX_NUM_SEQS
    return document


def level(url: str, streams: int, num_tokens: int, seconds: float) -> dict[str, Any]:
    """One level of load on a running server, with the processor time that it took."""
    requests = streams * max(2, round(seconds / (num_tokens * STEP_S)))
    asyncio.run(closed_loop(url, lambda _: body(num_tokens), streams, streams))  # warms up
    before, own = seconds_by_part(os.getpid()), time.process_time()
    outcomes, wall_s = asyncio.run(closed_loop(url, lambda _: body(num_tokens), streams, requests))
    took = {part: now - before[part] for part, now in seconds_by_part(os.getpid()).items()}
    took["load generator"] = time.process_time() - own
    found = summarise(outcomes, wall_s)
    sent = sum(outcome.num_tokens for outcome in outcomes)
    costs = {part: round(each / sent * 1e6, 1) for part, each in took.items()}
    return {
        "streams": streams,
        "share_of_ideal": round(found["tokens_per_s"] * STEP_S / streams, 4),
        "tokens_per_chunk": round(sent / sum(len(o.arrivals) for o in outcomes), 2),
        "us_per_token": costs,
        **{name: found[name] for name in ("tokens_per_s", "errors", "ttft_ms", "inter_token_ms")},
    }


def http(mode: str, num_tokens: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Every level of load in one way that Serve has."""
    port = free_port()
    path, url = folder / f"{mode}.yaml", f"http://127.0.0.1:{port}"
    path.write_text(yaml.safe_dump(config(port)), encoding="utf-8")
    command = ["-c", "from ray.serve.scripts import cli; cli()", "run", "--address", "local"]
    command = [sys.executable, *command, "--app-dir", str(ROOT), str(path)]
    levels = []
    with serving(command, MODES[mode], url, body(8), folder / f"{mode}.log"):
        for streams in STREAMS:
            found = level(url, streams, num_tokens, seconds)
            levels.append(found)
            print(
                f"{mode}, {streams:>2} streams: {found['share_of_ideal']:.1%} of the ideal, "
                f"{found['tokens_per_chunk']} tokens a chunk, {found['us_per_token']} us a token, "
                f"{found['errors']} errors",
                flush=True,
            )
    return levels


def main() -> int:
    """The command; exit code 1 when any request failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.road", description=__doc__)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--tokens", type=int, default=400, help="of each answer")
    parser.add_argument("--seconds", type=float, default=8, help="of each level over HTTP")
    parser.add_argument("--rounds", type=int, default=3, help="in one process; 0 for none")
    parser.add_argument("--save", type=Path, help="file for the last line's document")
    options = parser.parse_args()
    document: dict[str, Any] = {
        "benchmark": "road",
        **describe(),
        "step_ms": STEP_S * 1e3,
        "load_average": os.getloadavg()[0],
    }
    if options.rounds:
        document["alone_us_per_token"] = alone(options.tokens, options.rounds)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        document["http"] = {
            mode: http(mode, options.tokens, options.seconds, Path(folder))
            for mode in options.modes
        }
    publish(document, options.save)
    failed = [each for levels in document["http"].values() for each in levels if each["errors"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
