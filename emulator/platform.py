"""The platform: both sides' routes as one aiohttp app, which `Platform` runs in a thread."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

from aiohttp import web

from emulator.client_api import ClientApi
from emulator.faults import Faults, middleware
from emulator.queue import Job, Queue
from emulator.worker_api import WorkerApi

T = TypeVar("T")

CHECK_S = 0.1
"""Seconds between two checks for silent workers and for time limits that have passed."""


def create_app(queue: Queue, faults: Faults) -> web.Application:
    app = web.Application(client_max_size=64 * 1024 * 1024, middlewares=[middleware(faults)])
    app.add_routes(WorkerApi(queue).routes() + ClientApi(queue).routes())

    async def watched(_: web.Application) -> AsyncIterator[None]:
        watching = asyncio.create_task(_watch(queue))
        yield
        watching.cancel()
        await asyncio.wait({watching})

    app.cleanup_ctx.append(watched)
    return app


async def _watch(queue: Queue) -> None:
    while True:
        await queue.requeue_jobs_of_silent_workers()
        await queue.end_expired_jobs()
        await asyncio.sleep(CHECK_S)


class Platform:
    """`with Platform() as platform:` serves one endpoint, "ep", on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.url = ""
        self.queue: Queue
        self.faults = Faults()
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="platform", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def deliver_again(self, job: Job) -> None:
        """Delivers a job to a worker once more, whatever its state; clients see no change."""
        self._await(self.queue.deliver_again(job))

    def stop_again(self, job: Job) -> None:
        """Sends the worker a stop for a job, whatever its state."""
        self._await(self.queue.stop(job))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Withholds jobs inside the block; after it, one poll returns all of them."""
        self.queue.is_paused = True
        try:
            yield
        finally:
            self._await(self.queue.resume())

    def end_polls(self) -> None:
        """Ends the open polls of workers without a job."""
        self._await(self.queue.end_polls())

    @contextlib.contextmanager
    def unreachable(self) -> Iterator[None]:
        """Resets all connections, and refuses new ones inside the block."""
        self._await(self._disconnect())
        try:
            yield
        finally:
            self._await(self._listen())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self.queue = Queue()
        self._port = 0
        await self._listen()
        self.url = f"http://127.0.0.1:{self._port}"
        self._started.set()
        await self._stop.wait()
        await self._runner.cleanup()

    async def _listen(self) -> None:
        app = create_app(self.queue, self.faults)
        self._runner = web.AppRunner(app, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True).start()
        self._port = self._runner.addresses[0][1]

    async def _disconnect(self) -> None:
        assert self._runner.server is not None
        for site in list(self._runner.sites):
            await site.stop()
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()
