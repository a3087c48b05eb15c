"""The lag of the event loop in `/metrics`."""

import asyncio
import time

from serve_app.api.loop_lag import INTERVAL_S, LoopLag


def test_a_loop_that_is_kept_busy_is_late() -> None:
    """Work that blocks an event loop is measured as its lag."""

    async def measured() -> float:
        found: asyncio.Queue[float] = asyncio.Queue()
        lag = LoopLag(found.put_nowait)
        lag.start()
        lag.start()
        end = time.monotonic() + 3 * INTERVAL_S
        while time.monotonic() < end:  # the loop can run nothing meanwhile
            pass
        return await found.get()

    assert all(asyncio.run(measured()) >= 2 * INTERVAL_S for _ in range(2))
