"""SchedulingClass: the group and the priority by which the scheduler orders a request."""

from typing import NamedTuple


class SchedulingClass(NamedTuple):
    """The group of a request, and its priority."""

    group: str = ""
    """The engine divides its time evenly between the groups that have waiting requests, and its
    places for running sequences (`running_shares.py`). All requests without a group form one group,
    which may fill the request queue."""
    priority: int = 0
    """Requests with a smaller number are computed first, in all groups (as in vLLM)."""


DEFAULT_CLASS = SchedulingClass()
"""The class of a request without a group."""
