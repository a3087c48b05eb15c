"""Faults that a test injects into the platform's routes, and counts of requests and faults.

    platform.faults.inject("job-done", 500, RESET)     the next result gets a 500, the connection
                                                       of the one after it is reset
    platform.faults.delay_s["job-stream"] = 0.1        every chunk is acknowledged 0.1 s late

Routes have the names in their URLs: `job-take` (for batches too), `job-stop`, `job-done`,
`job-stream`, `ping`, and for clients `run`, `runsync`, `status`, `stream`, `cancel`. A progress
update, which is posted to the URL of results, counts as `progress`.
"""

import asyncio
import socket
import struct
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from emulator.queue import Job


@dataclass(frozen=True)
class Fault:
    """The answer to one request. Functions with a fault as argument also accept an `int` for a bare
    status."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    is_processed: bool = False
    """Whether the platform processes the request before it answers wrongly."""
    is_reset: bool = False
    """Whether the connection is reset (RST) instead of an answer."""
    is_held: bool = False
    """Whether the platform never answers; the connection stays open until the worker closes it."""


IS_UNACKNOWLEDGED = web.RequestKey("is_unacknowledged", bool)
"""Set on a request that is processed before its acknowledgement is sent, or without one."""
PROGRESS = b'"IN_PROGRESS"'
"""A text near the beginning of the body of a progress update."""
JOB = web.RequestKey("job", Job)
"""The job whose result such a request posted."""

RESET = Fault(is_reset=True)
LOST = Fault(is_processed=True, is_reset=True)
"""The platform has processed the request; the connection is reset before the acknowledgement."""
HELD = Fault(is_held=True)
NOT_JSON = Fault(body=b'{"id": "broken')
HTML = Fault(body=b"<html>Bad gateway</html>", content_type="text/html")


@dataclass
class Faults:
    """Planned faults, and counts of requests and faults."""

    delay_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds between processing a request and answering it, by route."""
    num_requests: Counter[str] = field(default_factory=Counter)
    """Number of requests by route, including those with a fault."""
    num_faults: Counter[str] = field(default_factory=Counter)
    """Number of requests with a fault, by route."""
    _plans: defaultdict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    _constant: dict[str, Fault] = field(default_factory=dict)

    def inject(self, route: str, *faults: int | Fault) -> None:
        """Answers the next requests of `route` with `faults`, one each."""
        self._plans[route].extend(_fault(fault) for fault in faults)

    def inject_always(self, route: str, fault: int | Fault) -> None:
        """Answers every request of `route` with `fault` until `clear`."""
        self._constant[route] = _fault(fault)

    def clear(self) -> None:
        """Ends all faults and delays; keeps the counts."""
        self._plans.clear()
        self._constant.clear()
        self.delay_s.clear()

    @property
    def num_planned(self) -> int:
        """Returns the number of injected faults that are not used yet."""
        return sum(map(len, self._plans.values()))

    def next(self, route: str) -> Fault | None:
        self.num_requests[route] += 1
        plan = self._plans[route]
        fault = plan.popleft() if plan else self._constant.get(route)
        self.num_faults[route] += fault is not None
        return fault


def middleware(faults: Faults) -> Middleware:
    """Applies `faults` to the requests of an app."""

    @web.middleware
    async def apply(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = await _route(request)
        fault = faults.next(route)
        if fault is None:
            delay_s = faults.delay_s[route]
            if delay_s == 0:
                return await handler(request)
            request[IS_UNACKNOWLEDGED] = True
            response = await handler(request)
            await asyncio.sleep(delay_s)
            is_processed = request.transport is not None and not request.transport.is_closing()
            if is_processed and (job := request.get(JOB)) is not None:
                job.num_results += 1
            return response
        if fault.is_held:
            await asyncio.Event().wait()
        if fault.is_processed:
            request[IS_UNACKNOWLEDGED] = fault.is_reset
            await handler(request)
        if fault.is_reset:
            await request.read()  # else the other side may be reset while it still writes
            reset(request)
        return web.Response(status=fault.status, body=fault.body, content_type=fault.content_type)

    return apply


def reset(request: web.Request) -> None:
    """Resets the connection, so that the other side reads ECONNRESET."""
    transport = request.transport
    if transport is None:
        return
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


async def _route(request: web.Request) -> str:
    name = (request.path.split("/") + [""] * 4)[3]
    if name == "job-done" and PROGRESS in (await request.read())[: 2 * len(PROGRESS)]:
        return "progress"
    return "job-take" if name == "job-take-batch" else name


def _fault(fault: int | Fault) -> Fault:
    return Fault(status=fault) if isinstance(fault, int) else fault
