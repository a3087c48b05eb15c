"""DeploymentClient: sends calls to the deployment through a Serve handle.

A handle needs no port, has half the latency of HTTP, and cancels a request when it is closed.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serve_app.errors import EngineDead, InternalError, QueueFull, ServeError
from serve_app.protocol.call import Call, ReplyItem
from serve_app.protocol.session import session_of

log = logging.getLogger(__name__)

Forward = Callable[[Call], AsyncGenerator[ReplyItem, None]]
"""A function that sends a call to the model and yields the items of the answer. Closing the
generator cancels the request. Raises `EngineDead` if the model is gone."""

EXTRA_TIMEOUT_S = 10.0
"""Seconds between the deployment's request timeout and the end of a call that no replica has
ended."""
GONE = "The model's process has ended. Send the request again."


class DeploymentClient:
    """Sends calls through one deployment handle; an instance is a `Forward`."""

    def __init__(self, handle: Any, timeout_s: float) -> None:
        """Calls end `EXTRA_TIMEOUT_S` after the deployment's request timeout, `timeout_s`."""
        # One handle for all calls: each copy would start its own metrics pusher and long poll.
        self._handle = handle.options(stream=True)
        self._limit_s = timeout_s + EXTRA_TIMEOUT_S
        self._open: set[asyncio.Timeout] = set()
        self._is_closed = False

    async def __call__(self, call: Call) -> AsyncGenerator[ReplyItem, None]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        if self._is_closed:
            raise EngineDead(GONE)
        handle = self._handle
        if (session := session_of(call)) is not None:
            handle = handle.options(session_id=session)  # both handles share one router
        response = handle.call.remote(
            call.method, call.path, call.body, call.request_id, call.traceparent
        )
        is_over = False
        scope = asyncio.timeout(self._limit_s)
        self._open.add(scope)
        try:
            async with scope:
                async for item in response:
                    yield item
            is_over = True
        except (RayError, RayServeException) as error:
            raise from_ray(error) from error
        except TimeoutError:
            if self._is_closed:
                raise EngineDead(GONE) from None
            raise
        finally:
            self._open.discard(scope)
            if not is_over and not self._is_closed:
                response.cancel()

    def close(self) -> None:
        """Ends running and later calls with `EngineDead`.

        Ray itself leaves running calls hanging if its GCS is gone.
        """
        self._is_closed = True
        now = asyncio.get_running_loop().time()
        for scope in self._open:
            scope.reschedule(now)


def from_ray(error: Exception) -> ServeError:
    """Returns the `ServeError` for a `RayError` or `RayServeException`, without Ray's text."""
    from ray.exceptions import RayTaskError, TaskCancelledError
    from ray.serve.exceptions import BackPressureError

    if isinstance(error, BackPressureError):
        return QueueFull("The queue is full. Send the request again in a moment.", retry_after_s=1)
    if isinstance(error, RayTaskError | TaskCancelledError):
        # The text may quote the user; the replica's own log has it at DEBUG.
        log.error("The deployment raised %s", type(getattr(error, "cause", error)).__name__)
        return InternalError("An internal error occurred. Please report it with the request id.")
    log.warning("The replica is gone: %s", type(error).__name__)
    return EngineDead(GONE)
