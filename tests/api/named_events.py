"""Reads the server-sent events of the Messages and the Responses API, which have names."""

import json
from typing import Any

import httpx


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Returns the events of a stream. The name of each is its type, and nothing follows them."""
    *texts, end = response.text.split("\n\n")
    assert end == ""
    events = []
    for text in texts:
        name, data = text.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events
