"""EventStream: the HTTP response with a streamed answer, as server-sent events."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.protocol import sse
from serve_app.protocol.call import JsonObject

KEEP_ALIVE_S = 10.0
"""Seconds without a first response chunk after which the stream begins with a comment, and seconds
between further comments. Proxies close connections that are silent for 30 to 100 s."""


class EventStream(StreamingResponse):
    """Sends response chunks as server-sent events, then `end`, or an error as the last event.

    Closes the generator of the chunks at the end, which cancels the request if it still runs.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[JsonObject, None],
        error_event: Callable[[Exception, JsonObject], Mapping[str, Any]],
        headers: dict[str, str],
        end: bytes = sse.DONE,
    ) -> None:
        """`error_event` returns the last event of a failed stream, from the error and the last
        response chunk, which is {} if there was none."""
        self._end = end
        self._chunks = chunks
        self._error_event = error_event
        self._last: JsonObject = {}
        self._is_over = False
        self._first = asyncio.create_task(self._next())
        # These headers keep proxies from buffering, which would delay the tokens.
        headers = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__((), headers=headers, media_type=sse.MEDIA_TYPE)

    async def begin(self) -> None:
        """Waits for the first response chunk, for at most `KEEP_ALIVE_S`.

        Raises the error if the answer fails before that, so that the response gets the error's
        status.
        """
        try:
            await asyncio.wait({self._first}, timeout=KEEP_ALIVE_S)
            if self._first.done():
                self._first.result()
        except BaseException:
            await self._close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while not self._first.done():
            await send({"type": "http.response.body", "body": sse.KEEP_ALIVE, "more_body": True})
            await asyncio.wait({self._first}, timeout=KEEP_ALIVE_S)
        event = await self._event(self._first)
        while not self._is_over:
            await send({"type": "http.response.body", "body": event, "more_body": True})
            event = await self._event(anext(self._chunks))
        await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _event(self, chunk: Awaitable[JsonObject]) -> bytes:
        """Waits for the next event. Connection errors are not raised here."""
        try:
            self._last = await chunk
            return sse.event(self._last)
        except StopAsyncIteration:
            self._is_over = True
            return self._end
        except Exception as raised:
            self._is_over = True
            return sse.event(self._error_event(raised, self._last))

    async def _next(self) -> JsonObject:
        return await anext(self._chunks)

    async def _close(self) -> None:
        # The generator cannot be closed while the task waits for its first chunk.
        self._first.cancel()
        await asyncio.gather(self._first, return_exceptions=True)
        await self._chunks.aclose()
