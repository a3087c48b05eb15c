"""What listens in each way of starting, and what guards it: the table in docs/security.md."""

import re
from pathlib import Path

import httpx

from tests.listening import LIMIT_S, is_local, listening, only_shows_figures, refuses

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
Port = tuple[str, str, str]
"""Process; `loopback` or `open`; guard: `key`, `token`, `figures` or `none`."""


def documented(way: str) -> set[Port]:
    """The rows of the page's table for one column, such as "`serve run`"."""
    header, _, *lines = re.findall(r"^\|.*\|$", PAGE.read_text().split("## Ports")[1], re.M)
    names = cells(header)
    found = set()
    for line in lines:
        row = dict(zip(names, cells(line), strict=True))
        if not line.startswith("| `"):
            break  # another table
        for where in re.findall(r"loopback|open", row[way]):
            found.add((row["process"].strip("`"), where, row["guard"]))
    return found


def cells(line: str) -> list[str]:
    return [each.strip() for each in line.strip("|").split("|")]


def observed(pid: int) -> set[Port]:
    """Every listening socket of a server, which has an API key and a token, by what it refuses."""
    found = set()
    for process, address, port in listening(pid):
        # `ray::ServeReplica:mixtral:mixtral`, `ray::ServeController.listen_for_change`
        name = re.split(r"(?<!:):(?!:)|\.", process.name())[0]
        where = "loopback" if is_local(address) else "open"
        found.add((name, where, guard(address, port)))
    return found


def guard(address: str, port: int) -> str:
    if asks_for_key(address, port):
        return "key"
    if refuses(address, port):
        return "token"
    return "figures" if only_shows_figures(address, port) else "none"


def asks_for_key(address: str, port: int) -> bool:
    """Whether the socket refuses a prompt with the error body of our own 401."""
    host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
    try:
        response = httpx.post(f"http://{host}:{port}/prompt", json={}, timeout=LIMIT_S)
    except httpx.TransportError:
        return False
    return response.status_code == 401 and "invalid_api_key" in response.text
