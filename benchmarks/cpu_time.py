"""Processor time of a server's processes, by what they are."""

from contextlib import suppress

import psutil

from serve_app.machine.processes import command, descendants

PARTS = (("ServeReplica", "replica"), ("ProxyActor", "proxy"), ("haproxy", "proxy"))
"""Words of a command line, and what such a process is; the first match counts."""
OTHER = "other"


def seconds_by_part(pid: int) -> dict[str, float]:
    """Returns the user and system seconds so far of all processes below `pid`, by part; `other` is
    the rest of Ray."""
    found = dict.fromkeys(("replica", "proxy", OTHER), 0.0)
    for child in descendants(pid):
        part = next((part for words, part in PARTS if words in command(child)), OTHER)
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            found[part] += times.user + times.system
    return found
