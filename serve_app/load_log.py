"""What a loading model says while it loads: to `/health`, and to whoever started the process.

The file `settings.load_log` gets one JSON object a line:

    {"phase": "weights", "state": "started"}
    {"phase": "weights", "state": "running", "done": 0.43}
    {"phase": "weights", "state": "done", "seconds": 41.2}
    {"phase": "weights", "state": "failed", "error": "One sentence.", "retry": false}

and after the last phase `{"phase": "ready", "state": "done", "seconds": of all}`. Knows not what
the phases are.
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


@dataclass(slots=True)
class LoadLog:
    """The phases of one load, in memory and in the file `path`."""

    path: str | None = None
    phases: list[dict[str, Any]] = field(default_factory=list)
    """`{"phase", "seconds"}` of each finished one, as `/health` shows them."""
    _told_at: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside; a failure is written down and goes on its way."""
        started = time.monotonic()
        self._write({"phase": name, "state": "started"})
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
        seconds = round(seconds, 3)
        self.phases.append({"phase": name, "seconds": seconds})
        self._write({"phase": name, "state": "done", "seconds": seconds})
        log.info("load: %s took %.1f s", name, seconds)

    def progress(self, phase: str, done: float) -> None:
        """How much of a phase is done, from 0 to 1; written once a second at most."""
        now = time.monotonic()
        if now - self._told_at >= PROGRESS_INTERVAL_S:
            self._told_at = now
            self._write({"phase": phase, "state": "running", "done": round(done, 3)})

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
