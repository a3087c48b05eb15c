"""A call handed to the deployment, and its answer item by item.

Through a handle rather than HTTP: no port, half the latency, and closing it cancels the request.
Turns Ray's errors into ours; knows neither jobs nor what is in a call.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve_app.errors import EngineDead, InternalError, QueueFull, ServeError
from serve_app.protocol.call import Call, ReplyItem

log = logging.getLogger(__name__)

Forward = Callable[[Call], AsyncGenerator[ReplyItem, None]]
"""Hands a call to the model. Closing the generator cancels the request. Raises `EngineDead` where
the model is gone."""

GRACE_S = 10.0
"""How much later than the deployment this door ends a request, should no replica do it."""


GONE = "The model's process ended; send the request again."


class Line:
    """Calls by a deployment handle; a `Forward`."""

    def __init__(self, handle: Any, timeout_s: float) -> None:
        """Calls end a little after `timeout_s` seconds if nobody else has ended them."""
        # One handle for all calls: each copy would start its own metrics pusher and long poll.
        self._handle = handle.options(stream=True)
        self._limit_s = timeout_s + GRACE_S
        self._open: set[asyncio.Timeout] = set()
        self._is_cut = False

    async def __call__(self, call: Call) -> AsyncGenerator[ReplyItem, None]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        if self._is_cut:
            raise EngineDead(GONE)
        response = self._handle.call.remote(call.method, call.path, call.body, call.request_id)
        is_over = False
        scope = asyncio.timeout(self._limit_s)
        self._open.add(scope)
        try:
            async with scope:
                async for item in response:
                    yield item
            is_over = True
        except (RayError, RayServeException) as error:
            raise as_serve_error(error) from error
        except TimeoutError:
            if self._is_cut:
                raise EngineDead(GONE) from None
            raise
        finally:
            self._open.discard(scope)
            if not is_over and not self._is_cut:
                response.cancel()

    def cut(self) -> None:
        """Ends all calls with `EngineDead`, and those still to come.

        Ray itself leaves them hanging when its GCS is gone.
        """
        self._is_cut = True
        now = asyncio.get_running_loop().time()
        for scope in self._open:
            scope.reschedule(now)


def as_serve_error(error: Exception) -> ServeError:
    """What a `RayError` or `RayServeException` means for the client, without its text."""
    from ray.exceptions import RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError

    if isinstance(error, BackPressureError):
        return QueueFull("The queue is full; try again in a moment.", retry_after_s=1)
    if isinstance(error, RayTaskError | TaskCancelledError):
        # Without its text, which may quote the user; the replica's own log has it at DEBUG.
        log.error("The deployment raised %s", type(getattr(error, "cause", error)).__name__)
        return InternalError("An internal error occurred; please report it with the request id.")
    log.warning("The replica is gone: %s", type(error).__name__)
    return EngineDead(GONE)
