"""The platform as one app, and as a thread beside a test."""

import asyncio
import threading
from types import TracebackType
from typing import Self

from aiohttp import web

from tests.emulator.client_half import ClientHalf
from tests.emulator.queue import Queue
from tests.emulator.worker_half import WorkerHalf


def create_app(queue: Queue) -> web.Application:
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.add_routes(WorkerHalf(queue).routes() + ClientHalf(queue).routes())
    return app


class Platform:
    """`with Platform() as platform:` serves one endpoint, "ep", on a free port of 127.0.0.1."""

    def __init__(self) -> None:
        self.url = ""
        self.queue: Queue
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

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self.queue = Queue()
        runner = web.AppRunner(create_app(self.queue), shutdown_timeout=1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()
