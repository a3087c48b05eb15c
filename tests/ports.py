"""The listening ports of each way to start, and their protection: the table in docs/security.md."""

import re
from contextlib import suppress
from pathlib import Path

import httpx
import psutil

from tests.listening import LIMIT_S, is_local, listening, only_shows_figures, refuses

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
Port = tuple[str, str, str]
"""Process; `loopback` or `open`; guard: `key`, `token`, `figures` or `none`."""


def undocumented(pid: int, way: str) -> set[Port]:
    """Returns what listens, or is guarded, otherwise than the page's column `way` says."""
    return observed(pid) - documented(way)


def documented(way: str) -> set[Port]:
    """Returns the rows of the page's table for one column, such as "`serve run`"."""
    table = PAGE.read_text().split("## Ports")[1].partition("\n\n|")[2].partition("\n\n")[0]
    header, _, *lines = table.splitlines()
    found = set()
    for line in lines:
        row = dict(zip(cells(header), cells(line), strict=True))
        for where in re.findall("loopback|open", row[way]):
            found.add((row["process"].strip("`"), where, row["guard"]))
    return found


def cells(line: str) -> list[str]:
    return [each.strip() for each in line.strip("|").split("|")]


def observed(pid: int) -> set[Port]:
    """Returns every listening socket of a server that has a key and a token, by what it refuses."""
    found = set()
    for process, address, port in listening(pid):
        where = "loopback" if is_local(address) else "open"
        # Serve replaces HAProxy, and Ray ends processes without work.
        with suppress(psutil.NoSuchProcess):
            guarded = guard(address, port)
            # `ray::ServeReplica:mixtral:mixtral`, `ray::ServeController.listen_for_change`
            name = re.match(r"(ray::)?[^:.]*", process.name())
            assert name
            found.add((name[0], where, guarded))
    return found


def guard(address: str, port: int) -> str:
    if asks_for_key(address, port):
        return "key"
    if refuses(address, port):
        return "token"
    return "figures" if only_shows_figures(address, port) else "none"


def asks_for_key(address: str, port: int) -> bool:
    """Returns whether the socket refuses a prompt with the error body of our own 401."""
    host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
    try:
        response = httpx.post(f"http://{host}:{port}/prompt", json={}, timeout=LIMIT_S)
    except httpx.TransportError:
        return False
    return response.status_code == 401 and "invalid_api_key" in response.text
