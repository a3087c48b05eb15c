"""Calls through the deployment handle: how they end. The handle is Ray's interface without Ray."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from serve_app.errors import EngineDead
from serve_app.node import client
from serve_app.node.client import DeploymentClient
from serve_app.protocol.call import Call

CALL = Call("POST", "/prompt", {"prompt": "x"}, "r1", traceparent="a trace")


class Response:
    """A response that has one item and then waits for ever."""

    def __init__(self) -> None:
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield {"chunk": {"token": "a"}}
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment handle that records its responses."""

    def __init__(self) -> None:
        self.call = self
        self.responses: list[Response] = []

    def options(self, *, stream: bool = True, session_id: str = "") -> "Handle":
        assert stream
        self.session_id = session_id
        return self

    def remote(self, *arguments: Any) -> Response:
        assert arguments == ("POST", "/prompt", {"prompt": "x"}, "r1", "a trace")
        self.responses.append(Response())
        return self.responses[-1]


def test_closing_a_call_cancels_the_request() -> None:
    """A caller that leaves between two items cancels the request in the replica."""

    async def leave() -> Handle:
        handle = Handle()
        items = DeploymentClient(handle, 60)(CALL)
        await anext(items)
        await items.aclose()
        return handle

    (response,) = asyncio.run(leave()).responses
    assert response.is_cancelled


def test_a_call_that_takes_too_long_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that no replica ends in time raises `TimeoutError`, and its request is cancelled."""
    monkeypatch.setattr(client, "EXTRA_TIMEOUT_S", 0.0)

    async def outlast() -> Handle:
        handle = Handle()
        with pytest.raises(TimeoutError):
            async for _ in DeploymentClient(handle, 0.01)(CALL):
                pass
        return handle

    (response,) = asyncio.run(outlast()).responses
    assert response.is_cancelled


def test_a_dead_ray_ends_open_and_later_calls() -> None:
    """After `close`, an open call and a later one raise `EngineDead`, and Ray is not called."""

    async def die() -> Handle:
        handle = Handle()
        forward = DeploymentClient(handle, 60)
        items = forward(CALL)
        await anext(items)
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)  # now it waits for its next item
        forward.close()
        with pytest.raises(EngineDead):
            await waiting
        with pytest.raises(EngineDead):
            await anext(forward(CALL))
        return handle

    (response,) = asyncio.run(die()).responses
    assert not response.is_cancelled
