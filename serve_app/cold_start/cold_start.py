"""ColdStart: wraps a load in the process that starts it, for jobs and for HTTP.

forecast      logs the predicted time of the load, and advice if it is too long
crash guard   refuses a load after three that failed for the same reason
read-ahead    reads the weights into the page cache while Ray starts
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from serve_app.cold_start import read_ahead
from serve_app.cold_start.crash_guard import CrashGuard
from serve_app.cold_start.forecast import Forecast, predict
from serve_app.config.settings import Settings
from serve_app.start_plan.plan import StartPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

FORECAST_LIMIT_S = 3.0
"""Maximum seconds to wait for the forecast, which may read from a slow volume."""


class ColdStart:
    """The cold starts of this process. `plan` is None if the check failed; then there is no
    forecast."""

    def __init__(self, settings: Settings, plan: StartPlan | None) -> None:
        """Starts to measure the reading speed, in a thread."""
        self._settings = settings
        self._plan = plan
        self._guard = CrashGuard(settings, plan)
        self._forecast: Forecast | None = None
        self._deadline = time.monotonic() + FORECAST_LIMIT_S
        self._predicting = threading.Thread(target=self._predict, name="forecast", daemon=True)
        self._predicting.start()

    async def around(self, load: Callable[[], Awaitable[T]]) -> T:
        """Runs `load` and returns its result. Raises `ModelLoadFailed` if the guard refuses it."""

        async def helped() -> T:
            await asyncio.to_thread(self._announce)
            with self._reading_ahead():
                return await load()

        return await self._guard.around(helped)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """The same as `around`, for a load in the `with` block that blocks the thread."""
        with self._guard.watch():
            self._announce()
            with self._reading_ahead():
                yield

    async def outlook(self) -> dict[str, Any]:
        """Returns fields for progress updates: `expected_s`, and `warning` if that is too long."""
        await asyncio.to_thread(self._wait)
        if self._forecast is None:
            return {}
        outlook: dict[str, Any] = {"expected_s": round(self._forecast.seconds)}
        if (warning := self._forecast.warning(self._settings)) is not None:
            outlook["warning"] = warning
        return outlook

    def _wait(self) -> None:
        # One deadline for all callers: if each of a hundred jobs waited, no thread would be left.
        self._predicting.join(max(0.0, self._deadline - time.monotonic()))

    def _announce(self) -> None:
        self._wait()
        if self._forecast is None:
            return
        warning = self._forecast.warning(self._settings)
        if warning is None:
            log.info("%s", self._forecast.sentence())
        else:
            log.warning("%s %s", self._forecast.sentence(), warning)

    def _reading_ahead(self) -> contextlib.AbstractContextManager[None]:
        files = self._plan.files if self._plan is not None else []
        return read_ahead.while_starting(files, self._settings.load_log)

    def _predict(self) -> None:
        if self._plan is None:
            return
        try:
            self._forecast = predict(self._plan)
        except OSError as error:
            log.debug("There is no forecast: %s", error)  # the load will name the cause
