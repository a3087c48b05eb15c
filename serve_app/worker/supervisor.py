"""StartupSupervisor: starts the model once for all waiting jobs, and once more if it dies.

    idle -> loading -> ready
               |         |-> loading again     after the rest of the old model was stopped
               |-> failed -> loading           a first start: the next job tries again, unless the
               |                               cause is final
               |-> given up                    a restart: every job fails with the cause, and the
                                               worker ends

A model that dies a second time before it has answered a job is given up too: each start takes
minutes, and the cause of both deaths is probably still there.
"""

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Literal, TypeVar

from serve_app.errors import EngineDead, ModelLoadFailed, ServeError
from serve_app.node.client import Forward

log = logging.getLogger(__name__)

T = TypeVar("T")

Status = Literal["idle", "loading", "ready", "failed"]

CONFIRM_S = 3.0
"""Maximum seconds to wait for the model's death to be noticed after a call has failed."""


async def _never() -> str:
    await asyncio.Event().wait()
    raise AssertionError


async def _nothing() -> None: ...


def _task(work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Returns a task whose log lines do not have the id of the job that starts it."""
    return asyncio.create_task(work, context=contextvars.Context())


class StartupSupervisor:
    """The model of this worker. The first job that needs the model starts it."""

    def __init__(
        self,
        start: Callable[[], Awaitable[Forward]],
        error: ServeError | None = None,
        *,
        watch: Callable[[], Awaitable[str]] = _never,
        stop: Callable[[], Awaitable[None]] = _nothing,
        gave_up: Callable[[], None] = lambda: None,
    ) -> None:
        """Creates the supervisor without starting the model.

        If `error` is given, every start fails with it. `watch` returns when the model has died,
        with the name of the dead process; `stop` ends the rest of the model. `gave_up` is called
        once, when no start will be tried again.
        """
        self._start = start
        self._watch = watch
        self._stop = stop
        self._gave_up = gave_up
        self._starting: asyncio.Task[Forward] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._may_restart = True
        self._has_given_up = False
        self._died = asyncio.Event()
        self.client: Forward | None = None
        """The client of the model; None until the model is ready."""
        self.error = error
        """The error of the last start, if it failed."""

    @property
    def status(self) -> Status:
        if self.client is not None:
            return "ready"
        if self._starting is not None:
            return "loading"
        return "idle" if self.error is None else "failed"

    async def ready(self) -> Forward:
        """Waits for the start of the model, and begins it if necessary.

        Raises the `ServeError` of a failed start. If one waiter is cancelled, the start continues
        for the others.
        """
        if self.client is not None:
            # The event loop that started the model may have ended (`runpod.start: eager`).
            if self._watching is None or self._watching.done():
                self._watching = _task(self._until_death())
            return self.client
        is_final = isinstance(self.error, ModelLoadFailed) and not self.error.retry
        if self.error is not None and (is_final or self._has_given_up):
            raise self.error
        if self._starting is None:
            self._starting = _task(self._run())
        return await asyncio.shield(self._starting)

    def answered(self, client: Forward) -> None:
        """Allows another restart if the current model has answered a job."""
        if client is self.client:
            self._may_restart = True

    async def wait_for_death(self, client: Forward) -> None:
        """Waits until `watch` reports the model's death, after a call has failed with `EngineDead`.

        Returns after at most `CONFIRM_S` seconds: if one of several replicas has died, the model is
        still alive.
        """
        if client is self.client:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONFIRM_S):
                    await self._died.wait()

    async def _run(self, dead_process: str | None = None) -> Forward:
        """Starts the model. For a restart, `dead_process` names the process of the old model that
        has died, and the rest of the old model is stopped first."""
        try:
            if dead_process is not None:
                await self._stop()
            self.client = await self._start()
            self.error = None
        except ServeError as error:
            log.error("The model could not be started: %s", error.message)
            self._fail(error, dead_process)
            raise
        except Exception as error:
            log.exception("The model could not be started.")
            failure = ModelLoadFailed("The model could not be started.", retry=True)
            self._fail(failure, dead_process)
            raise failure from error
        finally:
            self._starting = None
        self._died = asyncio.Event()
        self._watching = _task(self._until_death())
        return self.client

    async def _until_death(self) -> None:
        dead_process = await self._watch()
        self.client = None
        if self._may_restart:
            self._may_restart = False
            log.error("%s has died; the model is started again.", dead_process)
            starting = self._starting = _task(self._run(dead_process))
            # No job may be waiting for it; `error` has the reason of a failure.
            starting.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._died.set()
            return
        message = f"The worker ends: {dead_process} has died again before the model answered a job."
        log.error("%s", message)
        self._give_up(EngineDead(message))
        self._died.set()
        await self._stop()

    def _fail(self, error: ServeError, dead_process: str | None) -> None:
        if dead_process is None:
            self.error = error
        else:
            self._give_up(error)

    def _give_up(self, error: ServeError) -> None:
        self.error = error
        self._has_given_up = True
        self._gave_up()
