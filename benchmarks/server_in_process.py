"""ServerInProcess: the server with the null model and no Ray, called part by part.

`benchmarks.overhead` measures with it what each part of the path costs.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

from benchmarks.null_server import NullRunner, load
from serve_app.api.ingress import create_app
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.engine.engine import Engine
from serve_app.engine.sampling_params import SamplingParams
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.protocol import sse
from serve_app.protocol.call import Call, StreamReply

MAX_NUM_SEQS = 64


def completion(num_tokens: int) -> dict[str, Any]:
    """Returns the body of a streamed `/v1/completions` request."""
    return {
        "model": "tiny",
        "prompt": "Say it.",
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class ServerInProcess:
    """One server, and consumers that call it at different depths."""

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
        """Name and consumer. Each includes the part before it and one more."""

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
        call = Call("POST", "/v1/completions", completion(self._num_tokens), "r1")
        reply = await self.server.answer(call)
        assert isinstance(reply, StreamReply)
        return reply

    async def _chunks(self) -> None:
        async with aclosing((await self._reply()).chunks) as chunks:
            async for _ in chunks:
                pass

    async def _events(self) -> None:
        async with aclosing((await self._reply()).chunks) as chunks:
            async for chunk in chunks:
                sse.event(chunk)

    async def _responses(self) -> None:
        content = json.dumps(completion(self._num_tokens)).encode()
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
        """Returns the microseconds per token of the whole process, and of the engine's thread
        alone."""

        async def run() -> None:
            await asyncio.gather(*(self.parts[part]() for _ in range(streams)))

        own, began = self.runner.thread_s, time.process_time()
        asyncio.run(run())
        took, own = time.process_time() - began, self.runner.thread_s - own
        num_tokens = streams * self._num_tokens
        return took / num_tokens * 1e6, own / num_tokens * 1e6
