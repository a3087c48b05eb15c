"""Processor time of a server's processes by what they are, read from /proc."""

import os
from pathlib import Path

from tests.processes import descendants

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PARTS = (("ServeReplica", "replica"), ("ProxyActor", "proxy"), ("haproxy", "proxy"))
"""Words of a command line, and what such a process is; the first that fits counts."""
OTHER = "other"


def seconds_by_part(pid: int) -> dict[str, float]:
    """User and system seconds so far of everything below `pid`; `other` is the rest of Ray."""
    found = dict.fromkeys(("replica", "proxy", OTHER), 0.0)
    for child, title in descendants(pid).items():
        part = next((part for words, part in PARTS if words in title), OTHER)
        found[part] += _seconds(child)
    return found


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0  # it has just ended
    return (int(fields[11]) + int(fields[12])) * TICK_S
