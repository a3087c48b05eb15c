"""What surrounds a load in the process that orders it: said beforehand, guarded, and helped along.

    forecast     how long it will take, and what to do where the platform does not wait so long
    crash guard  a load that has failed three times alike is not tried a fourth time
    read ahead   the weights are being read while Ray starts

The same for both doors. Knows neither Ray nor jobs.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from serve_app.cold_start import read_ahead
from serve_app.cold_start.crash_guard import CrashGuard
from serve_app.cold_start.forecast import Forecast, predict
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import ServeError
from serve_app.loading.load import find_local
from serve_app.model.checkpoint.shards import shard_files

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_S = 3.0
"""Seconds that the forecast, which may ask the hub, has before nobody waits for it any more."""


class ColdStart:
    """The cold starts of this process."""

    def __init__(self, settings: Settings) -> None:
        """Begins to look at how long a load would take, in a thread."""
        self._settings = settings
        self._guard = CrashGuard(settings)
        self._files: list[Path] = []
        self._forecast: Forecast | None = None
        self._look_until = time.monotonic() + LOOK_S
        self._looking = threading.Thread(target=self._look, name="forecast", daemon=True)
        self._looking.start()

    async def around(self, load: Callable[[], Awaitable[T]]) -> T:
        """The result of `load`; raises `ModelLoadFailed` instead where it must not be tried."""

        async def helped() -> T:
            await asyncio.to_thread(self._announce)
            with self._reading_ahead():
                return await load()

        return await self._guard.around(helped)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """`around` for a load that blocks."""
        with self._guard.watch():
            self._announce()
            with self._reading_ahead():
                yield

    async def outlook(self) -> dict[str, Any]:
        """For those who wait: `{"expected_s"}`, and a `"warning"` where it will take too long."""
        await asyncio.to_thread(self._wait)
        if self._forecast is None:
            return {}
        told: dict[str, Any] = {"expected_s": round(self._forecast.seconds)}
        if (warning := self._forecast.warning(self._settings)) is not None:
            told["warning"] = warning
        return told

    def _wait(self) -> None:
        # A hundred jobs that each waited seconds of their own would hold all of the loop's threads.
        self._looking.join(max(0.0, self._look_until - time.monotonic()))

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
        return read_ahead.while_starting(self._files, self._settings.load_log)

    def _look(self) -> None:
        try:
            folder = find_local(self._settings)
            if folder is not None:
                self._files = shard_files(folder)
            self._forecast = predict(self._settings, folder, self._files)
        except (ServeError, ConfigError, OSError) as error:
            log.debug("There is no forecast: %s", error)  # the load will say what is wrong
