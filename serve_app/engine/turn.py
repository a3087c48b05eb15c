"""Turn: where a request stands among those that wait."""

from typing import NamedTuple


class Turn(NamedTuple):
    """Whose request it is, and how urgent."""

    group: str = ""
    """The engine shares its time evenly between the groups that have waiting requests. Requests
    without a group are one group, whose members may fill the request queue."""
    priority: int = 0
    """Requests of a smaller number are computed first, whatever their group (as in vLLM)."""


ANYONE = Turn()
"""The turn of a request without a group."""
