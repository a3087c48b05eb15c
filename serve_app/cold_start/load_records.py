"""Stores one small JSON file per process that loads a model, with the load and its outcome.

The files are on a volume that many workers share. Each worker writes its own file and reads the
others. A file in state "loading" whose process is gone belongs to a killed load.
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
"""Seconds without an update of its file after which a worker on another machine counts as gone."""
CLOCK_S = 1.5
"""Tolerance for the start time of a process, in seconds, because the clock may be adjusted."""
KILLED = "The process that loads the model was killed"


def write(file: Path, fields: Record) -> None:
    """Replaces the file atomically, so that a reader never sees a partial one."""
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": started_at(os.getpid()),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        **fields,
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(file)


def outcomes(folder: Path, own: Path) -> list[Record]:
    """Returns the records of the other finished loads with their `age_s`, the oldest first."""
    files = finished(folder, own)
    remove(files[:-MAX_RECORDS])
    now = own.stat().st_mtime  # the volume's clock may differ from this machine's
    records = []
    for file in files[-MAX_RECORDS:]:
        record = _read(file)
        if record is None:
            continue
        if record["state"] == "loading":
            cause = f"{KILLED} while it loaded, usually for lack of memory."
            record |= {"cause": cause, "may_pass": False}
        with contextlib.suppress(FileNotFoundError):
            records.append({**record, "age_s": now - file.stat().st_mtime})
    return records


def finished(folder: Path, own: Path) -> list[Path]:
    """Returns the files of loads that no longer run, except for `own`, the oldest first."""
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
        # A restarted container keeps its host name but reuses process ids.
        started = started_at(record["pid"])
        return started is not None and abs(started - record["process_started"]) < CLOCK_S
    try:
        return own.stat().st_mtime - file.stat().st_mtime < STALE_S
    except FileNotFoundError:
        return False


def _read(file: Path) -> Record | None:
    """Returns the record; None if the file is gone or invalid."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        required = {"state", "host", "pid", "process_started"}
        if isinstance(record, dict) and record.keys() >= required:
            return record
    except (OSError, ValueError):
        pass
    return None
