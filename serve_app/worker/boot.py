"""One start of the model, shared by every job that waits for it.

    idle -> loading -> ready
               |-> failed -> loading   (the next job tries again, unless the cause is final)

Knows who waits and what became of the start; how a model is started is handed in.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

from serve_app.errors import ModelLoadFailed, ServeError
from serve_app.worker.forward import Forward

log = logging.getLogger(__name__)

Status = Literal["idle", "loading", "ready", "failed"]


class Boot:
    """The model of this worker, started by the first job that needs it."""

    def __init__(
        self, start: Callable[[], Awaitable[Forward]], error: ServeError | None = None
    ) -> None:
        """`error` is why a start is known to fail before it was tried."""
        self._start = start
        self._starting: asyncio.Task[Forward] | None = None
        self.forward: Forward | None = None
        """How to reach the model; None until it is ready."""
        self.error = error
        """Why the last start failed."""

    @property
    def status(self) -> Status:
        if self.forward is not None:
            return "ready"
        if self._starting is not None:
            return "loading"
        return "idle" if self.error is None else "failed"

    async def ready(self) -> Forward:
        """Waits for the one start, beginning it where none is under way.

        Raises what made the start fail, to everyone who waits. Cancelling one waiter leaves the
        start to the others.
        """
        if self.forward is not None:
            return self.forward
        if isinstance(self.error, ModelLoadFailed) and not self.error.retry:
            raise self.error
        if self._starting is None:
            self._starting = asyncio.create_task(self._run())
        return await asyncio.shield(self._starting)

    async def _run(self) -> Forward:
        try:
            self.forward = await self._start()
            self.error = None
        except ServeError as error:
            self.error = error
            log.error("The model did not start: %s", error.message)
            raise
        except Exception as error:
            log.exception("The model did not start")
            self.error = ModelLoadFailed("The model could not be started.", retry=True)
            raise self.error from error
        finally:
            self._starting = None
        return self.forward
