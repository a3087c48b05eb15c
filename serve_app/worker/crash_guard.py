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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import serve_app
from serve_app.errors import ModelLoadFailed, ServeError
from serve_app.gpus import find_gpus
from serve_app.load import find_local
from serve_app.settings import Settings
from serve_app.worker.phases import started_at

log = logging.getLogger(__name__)

T = TypeVar("T")
Record = dict[str, Any]

FOLDER = ".mixtral-serve"
MAX_FAILURES = 3
MAX_RECORDS = 20
BEAT_S = 15.0
STALE_S = 90.0
"""A worker elsewhere that has not touched its file for so long is gone."""
PAUSE_S = 600.0
"""For so long a reason that may pass is not tried again."""
KILLED = "The process that loads the model was killed"


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
            outcomes = _outcomes(folder, self._file)
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
            may_pass = error.retry and not cause.startswith(KILLED)
        self._end(lambda: self._write({"state": "failed", "cause": cause, "may_pass": may_pass}))

    def succeeded(self) -> None:
        """Forgets all failures of this model; what others are loading stays."""
        if (own := self._file) is not None:
            self._end(lambda: _remove(_over(own.parent, own)))
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
        """The whole file at once: whoever reads it reads the old one or the new one."""
        assert self._file is not None
        record = {
            "model": self._settings.model.name,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": started_at(os.getpid()),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **news,
        }
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(self._file)

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


def _outcomes(folder: Path, own: Path) -> list[Record]:
    """What became of the other loads that are over, the oldest first, each with its `age_s`."""
    over = _over(folder, own)
    _remove(over[:-MAX_RECORDS])
    now = own.stat().st_mtime  # the volume's clock may be another than ours
    outcomes = []
    for file in over[-MAX_RECORDS:]:
        record = _read(file)
        if record is None:
            continue
        if record["state"] == "loading":
            cause = f"{KILLED} while it loaded, as happens where memory is short."
            record |= {"cause": cause, "may_pass": False}
        with contextlib.suppress(FileNotFoundError):
            outcomes.append({**record, "age_s": now - file.stat().st_mtime})
    return outcomes


def _over(folder: Path, own: Path) -> list[Path]:
    """Files of loads that do not run any more, except for `own`, the oldest first."""
    files = sorted(file for file in folder.glob("*.json") if file != own)
    return [file for file in files if not _is_running(file, own)]


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _is_running(file: Path, own: Path) -> bool:
    record = _read(file)
    if record is None or record["state"] != "loading":
        return False
    if record["host"] == socket.gethostname():
        # A container that was started again has its old name, and numbers its processes anew.
        return bool(started_at(record["pid"]) == record["process_started"])
    try:
        return own.stat().st_mtime - file.stat().st_mtime < STALE_S
    except FileNotFoundError:
        return False


def _read(file: Path) -> Record | None:
    """The record; None where it has just gone, or is none of ours."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known = {"state", "host", "pid", "process_started"}
        if isinstance(record, dict) and record.keys() >= known:
            return record
    except (OSError, ValueError):
        pass
    return None
