"""The path of a request stays short: `tools/trace_request.py` on the tiny model."""

import asyncio

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.protocol import values
from tools.trace_request import Tracer, measure, summary

MAX_FUNCTIONS = {
    "chat, in": 42,
    "chat, back": 25,
    "streamed chat, in": 47,
    "streamed chat, back, one delta": 18,
    "job": 70,
}
"""Lower a limit when a change makes its path shorter. Some 10 functions of a way in over HTTP limit
what clients send, and check for a free place before the body is read."""


def test_no_path_gets_longer() -> None:
    """No path runs more functions than listed; a stream passes two asynchronous generators."""
    server = MixtralServer(Settings.from_yaml("configs/tiny.yaml"))
    try:
        found = asyncio.run(measure(server))
    finally:
        server.close()
    longer = {
        path: counts["names"]
        for path, counts in found.items()
        if counts["functions"] > MAX_FUNCTIONS[path]
    }
    assert longer == {}
    assert found["streamed chat, back, one delta"]["async_generators"] == 2


def test_frames_are_counted_with_their_resumptions() -> None:
    """A resumed coroutine is one more frame of the same function."""

    async def read_twice() -> None:
        await values.read(lambda _: None, {})
        await values.read(lambda _: None, ["x"] * values.LARGE)

    with Tracer() as tracer:
        asyncio.run(read_twice())
    names = [code.co_name for code in tracer.frames]
    # Twice called, and once resumed after the thread that read the large value.
    assert names == ["read", "is_large", "read", "is_large", "read"]
    assert (summary(tracer.frames)["functions"], summary(tracer.frames)["frames"]) == (2, 5)
