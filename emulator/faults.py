"""What the platform does wrong when a test tells it to, counted.

    platform.faults.inject("job-done", 500, RESET)     the next result is refused, the one after
                                                       it loses its connection, then all is well
    platform.faults.delay_s["job-stream"] = 0.1        every streamed chunk is acknowledged late

A route goes by the name in its URL: `job-take` (a batch too), `job-stop`, `job-done`, `job-stream`,
`ping`, and the clients' `run`, `runsync`, `status`, `stream`, `cancel`. A progress update, which is
posted to the result's URL, is `progress`.
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
    """What becomes of one request; an `int` where one is asked for is that status alone."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    is_heard: bool = False
    """The platform acts on the request before it answers wrongly."""
    is_reset: bool = False
    """The connection is reset (RST) instead of an answer."""
    is_held: bool = False
    """No answer ever comes; the connection stays open until the worker closes it."""


IS_LATE = web.RequestKey("is_late", bool)
"""Set on a request whose acknowledgement comes later than it is acted upon, or never."""
JOB = web.RequestKey("job", Job)
"""Left by such a request: the job whose terminal body it was."""

RESET = Fault(is_reset=True)
LOST = Fault(is_heard=True, is_reset=True)
"""Recorded, but the connection breaks before the acknowledgement."""
HELD = Fault(is_held=True)
NOT_JSON = Fault(body=b'{"id": "broken')
HTML = Fault(body=b"<html>Bad gateway</html>", content_type="text/html")


@dataclass
class Faults:
    """The faults still to come, and what has happened so far."""

    delay_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """How late a request is answered, by route; it is acted upon before."""
    num_requests: Counter[str] = field(default_factory=Counter)
    """Requests that came, by route, the faulty ones too."""
    num_faults: Counter[str] = field(default_factory=Counter)
    """Faults that were met, by route."""
    _plans: defaultdict[str, deque[Fault]] = field(default_factory=lambda: defaultdict(deque))
    _constant: dict[str, Fault] = field(default_factory=dict)

    def inject(self, route: str, *faults: int | Fault) -> None:
        """The next requests of `route` meet `faults`, one each."""
        self._plans[route].extend(_fault(fault) for fault in faults)

    def inject_always(self, route: str, fault: int | Fault) -> None:
        """Every request of `route` meets `fault` until `clear`."""
        self._constant[route] = _fault(fault)

    def clear(self) -> None:
        """No more faults and delays; the counts stay."""
        self._plans.clear()
        self._constant.clear()
        self.delay_s.clear()

    @property
    def num_planned(self) -> int:
        """Faults that nobody has met yet."""
        return sum(map(len, self._plans.values()))

    def next(self, route: str) -> Fault | None:
        self.num_requests[route] += 1
        plan = self._plans[route]
        fault = plan.popleft() if plan else self._constant.get(route)
        self.num_faults[route] += fault is not None
        return fault


def middleware(faults: Faults) -> Middleware:
    """Lets `faults` happen to the app's requests."""

    @web.middleware
    async def happen(request: web.Request, handler: Handler) -> web.StreamResponse:
        route = _route(request)
        fault = faults.next(route)
        if fault is None:
            delay_s = faults.delay_s[route]
            if delay_s == 0:
                return await handler(request)
            request[IS_LATE] = True
            response = await handler(request)
            await asyncio.sleep(delay_s)
            is_heard = request.transport is not None and not request.transport.is_closing()
            if is_heard and (job := request.get(JOB)) is not None:
                job.num_results += 1
            return response
        if fault.is_held:
            await asyncio.Event().wait()
        if fault.is_heard:
            request[IS_LATE] = fault.is_reset
            await handler(request)
        if fault.is_reset:
            await request.read()  # else the other side may meet the reset while it writes
            reset(request)
        return web.Response(status=fault.status, body=fault.body, content_type=fault.content_type)

    return happen


def reset(request: web.Request) -> None:
    """Resets the connection: the other side reads ECONNRESET, no orderly end."""
    transport = request.transport
    if transport is None:
        return
    connection = transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _route(request: web.Request) -> str:
    name = (request.path.split("/") + [""] * 4)[3]
    if name == "job-done" and request.query.get("isStream") == "false":
        return "progress"  # the results of a generator say isStream=true
    return "job-take" if name == "job-take-batch" else name


def _fault(fault: int | Fault) -> Fault:
    return Fault(status=fault) if isinstance(fault, int) else fault
