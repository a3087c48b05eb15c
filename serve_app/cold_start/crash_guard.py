"""CrashGuard: refuses a load after three loads failed for the same reason, because each try is
billed.

Each loading process keeps one small JSON file on the network volume. The process writes the file
before the load, changes it if the load fails, and removes all files if the load succeeds. A file in
state "loading" whose process is gone belongs to a killed load. If the last three loads failed for
the same reason, the next load is refused until the settings, the model's files, the program or the
kind of GPU change, or the folder of records is removed. If the reason may be temporary, such as a
network failure, a load is tried again after 10 minutes.

Workers that share the volume write separate files, so they need no lock. Without a writable volume
nothing is recorded.
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
from serve_app.machine.gpus import find_gpus
from serve_app.machine.volume import is_mounted, volume_folder
from serve_app.start_plan.plan import StartPlan

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = ".mixtral-serve"
MAX_FAILURES = 3
HEARTBEAT_S = 15.0
"""Seconds between two updates of the record's modification time while the load runs."""
PAUSE_S = 600.0
"""Seconds until the next try after failures whose reason may be temporary."""


class CrashGuard:
    """Records the loads of one model by this process. `plan` is None if the check failed."""

    def __init__(self, settings: Settings, plan: StartPlan | None) -> None:
        """The constructor accesses no file."""
        self._settings = settings
        self._plan = plan
        self._file: Path | None = None
        self._is_over = threading.Event()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Guards the load in the `with` block. Raises `ModelLoadFailed` before the block if the
        load is refused."""
        try:
            self.begin()
            yield
        except Exception as error:
            self.failed(error)
            raise
        except BaseException:
            self.abandoned()
            raise
        self.succeeded()

    async def around(self, load: Callable[[], Awaitable[T]]) -> T:
        """The same as `watch` for an event loop, which a slow volume must not block."""
        try:
            await asyncio.to_thread(self.begin)
            loaded = await load()
        except Exception as error:
            await asyncio.to_thread(self.failed, error)
            raise
        except BaseException:
            self.abandoned()
            raise
        await asyncio.to_thread(self.succeeded)
        return loaded

    def begin(self) -> None:
        """Records the beginning of a load. Raises `ModelLoadFailed` if it is refused."""
        volume = volume_folder(self._settings.runpod.volume)
        if not is_mounted(volume):
            return
        try:
            folder = volume / FOLDER / fingerprint(self._settings, self._plan)
            folder.mkdir(parents=True, exist_ok=True)
            # Names sort by time: the oldest comes first.
            name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}.json"
            self._file = self._file or folder / name
            self._write({"state": "loading"})
            outcomes = load_records.outcomes(folder, self._file)
        except OSError as error:
            log.warning("Failing loads cannot be recorded on the volume (%s).", error.strerror)
            self._file = None
            return
        if (refusal := _refusal(outcomes, folder)) is not None:
            self.abandoned()
            raise refusal
        self._is_over.clear()
        threading.Thread(target=self._heartbeat, name="crash-guard", daemon=True).start()

    def failed(self, error: Exception) -> None:
        """Records the cause of a failed load."""
        cause, may_pass = f"The model could not be started ({type(error).__name__}).", False
        if isinstance(error, ServeError):
            cause = error.message
            may_pass = error.retry and not isinstance(error, LoaderKilled)
        self._end(lambda: self._write({"state": "failed", "cause": cause, "may_pass": may_pass}))

    def succeeded(self) -> None:
        """Removes the records of all finished loads; those of running loads stay."""
        if (own := self._file) is not None:
            self._end(lambda: load_records.remove(load_records.finished(own.parent, own)))
            self.abandoned()

    def abandoned(self) -> None:
        """Removes the record of a load that a signal stopped, which does not count as a failure."""
        if (file := self._file) is not None:
            self._end(lambda: file.unlink(missing_ok=True))
            self._file = None

    def _end(self, write: Callable[[], object]) -> None:
        self._is_over.set()
        if self._file is not None:
            try:
                write()
            except OSError as error:
                log.warning("This load could not be recorded on the volume (%s).", error.strerror)

    def _write(self, record: Record) -> None:
        assert self._file is not None
        load_records.write(self._file, {"model": self._settings.model.name, **record})

    def _heartbeat(self) -> None:
        while not self._is_over.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                if self._file is not None:
                    os.utime(self._file)


def fingerprint(settings: Settings, plan: StartPlan | None) -> str:
    """Returns a digest of the load's inputs: settings, files, program and kind of GPU."""
    is_local = plan is not None and plan.repository is None
    files = sorted(plan.checkpoint.path.iterdir()) if plan is not None and is_local else []
    token = settings.model.hf_token
    inputs = (
        serve_app.__version__,
        settings.model.model_dump(mode="json", exclude={"hf_token"}),
        # Twelve digits of the digest reveal nothing about the token.
        token.get_secret_value() if token else None,
        settings.engine.model_dump(mode="json"),
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        [(gpu.name, gpu.total_bytes) for gpu in find_gpus()],
    )
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]


def _refusal(outcomes: list[Record], folder: Path) -> ModelLoadFailed | None:
    """Returns the error that refuses another load after `outcomes` (oldest first), or None."""
    last = outcomes[-MAX_FAILURES:]
    # Numbers in a cause vary, such as free bytes.
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
        f"{cause}; the last {MAX_FAILURES} loads failed for this reason; none is tried {until}.",
        retry=may_pass,
    )
