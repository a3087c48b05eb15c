"""What a loading model says while it loads: to `/health`, and to whoever started the process.

The file `settings.load_log` gets one JSON object a line:

    {"phase": "read", "state": "started", "at": seconds since the epoch}
    {"phase": "read", "state": "running", "done": 0.43, "bytes": of all of it, where known}
    {"phase": "read", "state": "done", "seconds": 41.2}
    {"phase": "read", "state": "failed", "error": "One sentence.", "retry": false}

and after the last phase `{"phase": "ready", "state": "done", "seconds": of all}`. A process that
starts another one to load the model writes its own phases first, and leaves the last of them to be
ended by that other one (`begun_by_parent`). Knows not what the phases are.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.errors import ModelLoadFailed, ServeError

log = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 1.0
PHASE_LINE = "Cold start: %s %.1f s"


@dataclass(slots=True)
class LoadLog:
    """The phases of one load, in memory and in the file `path`."""

    path: str | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    """`{"phase", "seconds"}` of each finished one, as `/health` shows them."""
    _told_at: float = 0.0

    @classmethod
    def begun_by_parent(cls, path: str | None) -> "LoadLog":
        """The log in `path`, with the phases of the process that started this one.

        The phase that is under way there ends now. A new one where no load has just begun: it is
        over, say, and this process replaces the one that loaded.
        """
        load_log = cls(path)
        written = read_lines(path) if path is not None else []
        if not written or written[-1]["state"] != "started":
            return load_log
        done = [line for line in written if line["state"] == "done"]
        load_log.phases = [{"phase": it["phase"], "seconds": it["seconds"]} for it in done]
        load_log.done(written[-1]["phase"], max(0.0, time.time() - written[-1]["at"]))
        return load_log

    def start_anew(self) -> None:
        """Forgets what an earlier load has written."""
        self.phases.clear()
        if self.path is not None:
            Path(self.path).unlink(missing_ok=True)

    def start(self, name: str) -> None:
        """Begins a phase that `done` ends, here or in another process."""
        self._write({"phase": name, "state": "started", "at": round(time.time(), 3)})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside; a failure is written down and goes on its way."""
        started = time.monotonic()
        self.start(name)
        try:
            yield
        except ServeError as error:
            failure = {"error": error.message, "retry": error.retry}
            self._write({"phase": name, "state": "failed", **failure})
            raise
        except Exception:
            failure = {"error": f"The load failed in phase {name}; the log says why."}
            self._write({"phase": name, "state": "failed", "retry": False, **failure})
            raise
        self.done(name, time.monotonic() - started)

    def done(self, name: str, seconds: float) -> None:
        """Ends a phase that took so many seconds."""
        seconds = round(seconds, 3)
        self.phases.append({"phase": name, "seconds": seconds})
        self._write({"phase": name, "state": "done", "seconds": seconds})
        log.info(PHASE_LINE, name, seconds)

    def ready(self) -> None:
        """After the last phase: what all of them took."""
        self.done("ready", sum(phase["seconds"] for phase in self.phases))

    def progress(self, phase: str, done: float, num_bytes: int | None = None) -> None:
        """How much of a phase is done, from 0 to 1, of `num_bytes` where it is about bytes.

        Written once a second at most.
        """
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_INTERVAL_S:
            self._told_at = now
            size = {} if num_bytes is None else {"bytes": num_bytes}
            self._write({"phase": phase, "state": "running", "done": round(done, 3), **size})

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise ModelLoadFailed(
                f"`load_log`: {self.path} cannot be written ({error.strerror})."
            ) from None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """What a load log holds; a line still being written is left for the next look."""
    try:
        written = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in written if line.endswith("\n")]
