"""One small JSON file for each process that loads a model: what it is about, and what became of it.

On a volume that many workers share; each writes its own file and reads those of the others. A file
that says "loading" while its process is gone is that of a load which was killed. Knows not what
follows from that.
"""

import contextlib
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_app.machine.processes import started_at

Record = dict[str, Any]

MAX_RECORDS = 20
STALE_S = 90.0
"""A worker elsewhere that has not touched its file for so long is gone."""
CLOCK_S = 1.5
"""The start of a process is computed from the clock, which may be adjusted meanwhile."""
KILLED = "The process that loads the model was killed"


def write(file: Path, news: Record) -> None:
    """The whole file at once: whoever reads it reads the old one or the new one."""
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": started_at(os.getpid()),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **news,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(file)


def outcomes(folder: Path, own: Path) -> list[Record]:
    """What became of the other loads that are over, the oldest first, each with its `age_s`."""
    files = over(folder, own)
    remove(files[:-MAX_RECORDS])
    now = own.stat().st_mtime  # the volume's clock may be another than ours
    found = []
    for file in files[-MAX_RECORDS:]:
        record = _read(file)
        if record is None:
            continue
        if record["state"] == "loading":
            cause = f"{KILLED} while it loaded, as happens where memory is short."
            record |= {"cause": cause, "may_pass": False}
        with contextlib.suppress(FileNotFoundError):
            found.append({**record, "age_s": now - file.stat().st_mtime})
    return found


def over(folder: Path, own: Path) -> list[Path]:
    """Files of loads that do not run any more, except for `own`, the oldest first."""
    files = sorted(file for file in folder.glob("*.json") if file != own)
    return [file for file in files if not _is_running(file, own)]


def remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _is_running(file: Path, own: Path) -> bool:
    record = _read(file)
    if record is None or record["state"] != "loading":
        return False
    if record["host"] == socket.gethostname():
        # A container that was started again has its old name, and numbers its processes anew.
        started = started_at(record["pid"])
        return started is not None and abs(started - record["process_started"]) < CLOCK_S
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
