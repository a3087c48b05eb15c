"""Stops a model that fails again and again from being loaded again and again, which is billed.

Each process that loads keeps one small JSON file on the network volume: written before the load,
changed when it fails, removed with all the others when it succeeds. One that still says "loading"
while its process is gone was killed, out of memory say. Where the last three loads failed for the
same reason, the next one is refused without being tried, until the settings, the model's files, the
program or the kind of GPU change, which makes it another folder, or the folder is removed. A
reason that may pass, such as a lost network, is tried again after some minutes.

Workers that share the volume write files of their own, so they need no lock. Without a volume that
can be written nothing is remembered. Knows nothing of how a model is loaded.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import serve_app
from serve_app.cold_start import load_records
from serve_app.cold_start.load_records import Record
from serve_app.config.settings import Settings
from serve_app.errors import LoaderKilled, ModelLoadFailed, ServeError
from serve_app.loading.load import find_local
from serve_app.machine.gpus import find_gpus

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = ".mixtral-serve"
MAX_FAILURES = 3
BEAT_S = 15.0
PAUSE_S = 600.0
"""For so long a reason that may pass is not tried again."""


class CrashGuard:
    """The memory of one process's loads of one model."""

    def __init__(self, settings: Settings) -> None:
        """Touches nothing yet."""
        self._settings = settings
        self._file: Path | None = None
        self._stop_beating = threading.Event()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """The load happens inside. Raises `ModelLoadFailed` instead where it must not be tried."""
        try:
            self.begin()
            yield
        except Exception as error:
            self.failed(error)
            raise
        except BaseException:
            self.left()
            raise
        self.succeeded()

    async def around(self, load: Callable[[], Awaitable[T]]) -> T:
        """`watch` for an event loop, which a slow volume must not stop."""
        try:
            await asyncio.to_thread(self.begin)
            loaded = await load()
        except Exception as error:
            await asyncio.to_thread(self.failed, error)
            raise
        except BaseException:
            self.left()
            raise
        await asyncio.to_thread(self.succeeded)
        return loaded

    def begin(self) -> None:
        """Writes down that a load begins; raises `ModelLoadFailed` where it must not."""
        volume = Path(self._settings.runpod.volume)
        if not volume.is_dir():
            return
        try:
            folder = volume / FOLDER / fingerprint(self._settings)
            folder.mkdir(parents=True, exist_ok=True)
            # Files are sorted by their names: the oldest comes first.
            name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}.json"
            self._file = self._file or folder / name
            self._write({"state": "loading"})
            outcomes = load_records.outcomes(folder, self._file)
        except OSError as error:
            log.warning("The volume keeps no record of failing loads (%s).", error.strerror)
            self._file = None
            return
        if (refusal := _refusal(outcomes, folder)) is not None:
            self.left()
            raise refusal
        self._stop_beating.clear()
        threading.Thread(target=self._beat, name="crash-guard", daemon=True).start()

    def failed(self, error: Exception) -> None:
        """Writes down why the load failed."""
        cause, may_pass = f"The model could not be started ({type(error).__name__}).", False
        if isinstance(error, ServeError):
            cause = error.message
            may_pass = error.retry and not isinstance(error, LoaderKilled)
        self._end(lambda: self._write({"state": "failed", "cause": cause, "may_pass": may_pass}))

    def succeeded(self) -> None:
        """Forgets all failures of this model; what others are loading stays."""
        if (own := self._file) is not None:
            self._end(lambda: load_records.remove(load_records.over(own.parent, own)))
            self.left()

    def left(self) -> None:
        """The load was given up, which is no failure: somebody told the process to stop."""
        if (file := self._file) is not None:
            self._end(lambda: file.unlink(missing_ok=True))
            self._file = None

    def _end(self, write: Callable[[], object]) -> None:
        self._stop_beating.set()
        if self._file is not None:
            try:
                write()
            except OSError as error:
                log.warning("The volume keeps no record of this load (%s).", error.strerror)

    def _write(self, news: Record) -> None:
        assert self._file is not None
        load_records.write(self._file, {"model": self._settings.model.name, **news})

    def _beat(self) -> None:
        while not self._stop_beating.wait(BEAT_S):
            with contextlib.suppress(OSError):
                if self._file is not None:
                    os.utime(self._file)


def fingerprint(settings: Settings) -> str:
    """Another one whenever a load may end otherwise: settings, files, program, kind of GPU."""
    try:
        folder = find_local(settings)
    except ModelLoadFailed:
        folder = None
    files = sorted(folder.iterdir()) if folder is not None else []
    token = settings.model.hf_token
    seen = (
        serve_app.__version__,
        settings.model.model_dump(mode="json", exclude={"hf_token"}),
        # Of which a dozen digits of a digest of all this tell nothing.
        token.get_secret_value() if token else None,
        settings.engine.model_dump(mode="json"),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        [(gpu.name, gpu.total_bytes) for gpu in find_gpus()],
    )
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]


def _refusal(outcomes: list[Record], folder: Path) -> ModelLoadFailed | None:
    """Why no other try is made, given the earlier ones, the oldest first."""
    last = outcomes[-MAX_FAILURES:]
    # Numbers differ from time to time, as free bytes do.
    causes = {re.sub(r"\d+", "0", record["cause"]) for record in last}
    if len(last) < MAX_FAILURES or len(causes) != 1:
        return None
    cause = last[-1]["cause"].rstrip(".")
    may_pass = all(record["may_pass"] for record in last)
    if may_pass and last[-1]["age_s"] > PAUSE_S:
        return None
    until = f"until the model's settings change or {folder} is removed"
    if may_pass:
        until = f"for {PAUSE_S / 60:.0f} minutes"
    return ModelLoadFailed(
        f"{cause}; as the last {MAX_FAILURES} loads failed so, none is tried {until}.",
        retry=may_pass,
    )
