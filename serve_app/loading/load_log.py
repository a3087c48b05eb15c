"""LoadLog: records the phases of one load, in memory and in the file `settings.load_log`.

`/health` shows the phases in memory; the parent process reads the file. The process that starts Ray
writes the first phases and leaves the phase "replica" open. The replica ends that phase
(`LoadLog.resume`) and writes the others. `phases.py` defines the format.

A model loads on a full disk too; then the file lacks events, and a warning says so.
"""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from serve_app.errors import ModelLoadFailed, ServeError
from serve_app.loading.phases import (
    Done,
    Event,
    Failed,
    Phase,
    PhaseTime,
    Running,
    Started,
    finished,
    read_events,
)

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
PHASE_LINE = "Cold start: %s %.1f s"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def log_phase(log: logging.Logger, event: Done) -> None:
    """Logs a finished phase."""
    fields = {"phase": event.phase.value, "seconds": event.seconds}
    log.info(PHASE_LINE, event.phase, event.seconds, extra={"fields": fields})


@dataclass(slots=True)
class LoadLog:
    """The phases of one load, in memory and in the file `path`, if it is not None."""

    path: str | None = None
    phases: list[PhaseTime] = field(default_factory=list)
    """The finished phases, in the form of `/health`."""
    _last_progress: float = 0.0
    """The time of the last progress event, on the monotonic clock."""
    _has_warned: bool = False

    @classmethod
    def resume(cls, path: str | None) -> "LoadLog":
        """Returns the log in `path` with the phases of the parent process.

        Ends the phase that the parent left open. If no phase is open, the log belongs to a finished
        load of an earlier replica, and the new log begins empty.
        """
        load_log = cls(path)
        events = read_events(path) if path is not None else []
        if not events or not isinstance(opened := events[-1], Started):
            return load_log
        load_log.phases = finished(events)
        load_log.done(opened.phase, max(0.0, time.time() - opened.at))
        return load_log

    def clear(self) -> None:
        """Removes the events of an earlier load, also from the file."""
        self.phases.clear()
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)

    def start(self, phase: Phase) -> None:
        """Begins a phase. `done` ends it, in this or another process."""
        self._write(Started(phase=phase, at=round(time.time(), 3)))

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Times the block. An error is written as a `Failed` event and raised again."""
        started = time.monotonic()
        self.start(phase)
        try:
            yield
        except ServeError as error:
            self._write(Failed(phase=phase, error=error.message, retry=error.retry))
            raise
        except Exception:
            sentence = f"The load failed in phase {phase}; the cause is in the log."
            self._write(Failed(phase=phase, error=sentence, retry=False))
            raise
        self.done(phase, time.monotonic() - started)

    def done(self, phase: Phase, seconds: float) -> None:
        """Ends a phase that took `seconds`."""
        event = Done(phase=phase, seconds=round(seconds, 3))
        self.phases += finished([event])
        self._write(event)
        log_phase(log, event)

    def ready(self) -> None:
        """Ends the load with the event "ready", whose seconds are the sum of all phases."""
        self.done(Phase.READY, sum(phase["seconds"] for phase in self.phases))

    def progress(self, phase: Phase, done: float, num_bytes: int | None = None) -> None:
        """Writes the progress of a phase, from 0 to 1, at most once a second.

        `num_bytes` is the total size if progress is counted in bytes.
        """
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_INTERVAL_S:
            self._last_progress = now
            self._write(Running(phase=phase, done=round(done, 3), bytes=num_bytes))

    def _write(self, event: Event) -> None:
        if self.path is None:
            return
        try:
            _append(Path(self.path), event.model_dump_json(exclude_none=True) + "\n")
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise ModelLoadFailed(
                    f"`load_log`: {self.path} cannot be written ({error.strerror})."
                ) from None
            if not self._has_warned:
                log.warning(
                    "%s cannot be written (%s); /health lacks phases of this load.",
                    self.path,
                    error.strerror,
                )
            self._has_warned = True


def _append(path: Path, line: str) -> None:
    """Appends all of `line`, or nothing if the disk is full: the next line must not follow a part
    of one."""
    data = line.encode()
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        if file.write(data) < len(data):
            file.truncate(size)
            raise OSError(errno.ENOSPC, "No space left on device")
