"""Which processes belong to which: read from /proc, as an operator would with `ps`."""

from pathlib import Path


def descendants(pid: int) -> dict[int, str]:
    """Pid and command line of every living process below `pid`."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # "pid (name) state ppid ...", where the name may hold anything
                state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                title = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has just ended
            parents[int(folder.name)] = int(parent)
            if state != "Z":
                titles[int(folder.name)] = title

    def is_below(child: int) -> bool:
        while child not in (0, pid):
            child = parents.get(child, 0)
        return child == pid

    return {child: title for child, title in titles.items() if child != pid and is_below(child)}


def all_below(pid: int) -> set[tuple[int, str]]:
    """Every process below `pid`, as `running` tells of them."""
    return {known for child in descendants(pid) if (known := _known(child)) is not None}


def ray_below(pid: int) -> set[tuple[int, str]]:
    """Ray's processes below `pid`."""
    titles = descendants(pid)
    rays = [child for child, title in titles.items() if "ray::" in title or "/ray/" in title]
    return {known for child in rays if (known := _known(child)) is not None}


def running() -> set[tuple[int, str]]:
    """Every living process: its pid, and its start, which tells it from a later one."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return {known for pid in pids if (known := _known(pid)) is not None}


def told_of(pid: int) -> list[str]:
    """What a failing test says of a process that should have gone."""
    try:
        folder = Path("/proc") / str(pid)
        return [
            (folder / name).read_text().replace("\0", " ")[:300] for name in ("cmdline", "stat")
        ]
    except OSError:
        return []


def _known(pid: int) -> tuple[int, str] | None:
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (pid, fields[19])


def one_below(pid: int, words: str) -> int:
    """The one process below `pid` whose command line holds `words`."""
    (found,) = [child for child, title in descendants(pid).items() if words in title]
    return found


def replica_of(pid: int) -> int:
    """The process of the replica below `pid`."""
    return one_below(pid, "ServeReplica:mixtral")
