"""One start of the model, shared by every job that waits for it, and one more when it dies.

    idle -> loading -> ready
               |         |-> loading again     what started it is taken down first
               |-> failed -> loading           a first start: the next job tries again, unless the
               |                               cause is final
               |-> given up                    a restart: every job fails with the cause, and the
                                               worker is told to end

A model that dies again before it has answered a job is given up too: each start costs minutes, and
whatever killed it twice is still there.

Knows who waits and what became of the start; how a model is started, watched and taken down is
handed in.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Literal

from serve_app.errors import EngineDead, ModelLoadFailed, ServeError
from serve_app.node.forward import Forward

log = logging.getLogger(__name__)

Status = Literal["idle", "loading", "ready", "failed"]

CONFIRM_S = 3.0
"""How long after a failed call a death may go unnoticed."""


async def _for_ever() -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def _nothing() -> None: ...


class Boot:
    """The model of this worker, started by the first job that needs it.

    `watch` returns when the model has died, with what of it did; `stop` takes down what is left of
    it. `gave_up` is called once, when no start will be tried again. `error` is why a start is known
    to fail before it was tried.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[Forward]],
        error: ServeError | None = None,
        *,
        watch: Callable[[], Awaitable[str]] = _for_ever,
        stop: Callable[[], Awaitable[None]] = _nothing,
        gave_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._start = start
        self._watch = watch
        self._stop = stop
        self._gave_up = gave_up
        self._starting: asyncio.Task[Forward] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._may_restart = True
        self._has_given_up = False
        self._died = asyncio.Event()
        self.forward: Forward | None = None
        """How to reach the model; None until it is ready."""
        self.error = error
        """Why the last start failed, or no other is tried."""

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
            self._watch_from_here()
            return self.forward
        is_final = isinstance(self.error, ModelLoadFailed) and not self.error.retry
        if self.error is not None and (is_final or self._has_given_up):
            raise self.error
        if self._starting is None:
            self._starting = asyncio.create_task(self._run())
        return await asyncio.shield(self._starting)

    def answered(self, forward: Forward) -> None:
        """`forward` has answered a job: should it die, it is worth another start."""
        if forward is self.forward:
            self._may_restart = True

    async def confirmed(self, forward: Forward) -> None:
        """After a call that failed as if the model were dead: returns when that is known.

        Or after `CONFIRM_S` seconds, as one of several replicas may have died.
        """
        if forward is self.forward:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._died.wait()

    async def _run(self, lost: str | None = None) -> Forward:
        """Starts the model; where `lost` says what died, takes down the rest of it first."""
        try:
            if lost is not None:
                await self._stop()
            self.forward = await self._start()
            self.error = None
        except ServeError as error:
            log.error("The model did not start: %s", error.message)
            self._fail(error, lost)
            raise
        except Exception as error:
            log.exception("The model did not start")
            failure = ModelLoadFailed("The model could not be started.", retry=True)
            self._fail(failure, lost)
            raise failure from error
        finally:
            self._starting = None
        self._died = asyncio.Event()
        self._watch_from_here()
        return self.forward

    def _watch_from_here(self) -> None:
        """Watches in this event loop; the one that the model was started in may have ended."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._until_death())

    async def _until_death(self) -> None:
        lost = await self._watch()
        self.forward = None
        if self._may_restart:
            self._may_restart = False
            log.error("The worker lost %s; the model is started again.", lost)
            starting = self._starting = asyncio.create_task(self._run(lost))
            # Nobody may be waiting for it; what went wrong stands in `error`.
            starting.add_done_callback(lambda it: it.cancelled() or it.exception())
            self._died.set()
            return
        message = f"The worker lost {lost} again before it had answered a job, and ends."
        log.error("%s", message)
        self._give_up(EngineDead(message))
        self._died.set()
        await self._stop()

    def _fail(self, error: ServeError, lost: str | None) -> None:
        if lost is None:
            self.error = error
        else:
            self._give_up(error)

    def _give_up(self, error: ServeError) -> None:
        self.error = error
        self._has_given_up = True
        self._gave_up()
