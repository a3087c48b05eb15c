"""Memory of a worker's processes, Ray's included, found by the HOME that they were given."""

from collections import Counter
from pathlib import Path

KINDS = {
    "ray::ServeReplica": "replica",
    "ray::ServeController": "Serve's controller",
    "runpod_entry.py": "worker",
    "/raylet/raylet": "raylet",
    "gcs_server": "Ray's control store",
}
"""A part of the command line, and the name that the process has in figures."""


def memory_by_process(home: Path) -> Counter[str]:
    """Returns the bytes by kind of process, for processes whose HOME is `home`; shared pages count
    once.

    Ray's daemons leave their parent's session, but keep HOME.
    """
    found: Counter[str] = Counter()
    marker = f"HOME={home}".encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[_kind(command)] += _proportional(process)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended while we looked
    return found


def _kind(command: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in command), "Ray's other")


def _proportional(process: Path) -> int:
    """Returns resident bytes; a page that n processes share counts 1/n (`Pss` of proc(5))."""
    for line in (process / "smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
