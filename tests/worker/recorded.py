"""The posts of a job, recorded instead of sent."""

import json
from typing import Any

from serve_app.worker.result import Result


class RecordedPosts:
    """Remembers what a handler posts for one job."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.encoded: list[bytes] = []
        self.results: list[Result] = []

    async def progress(self, update: dict[str, Any]) -> None:
        self.updates.append(update)

    async def chunk(self, value: bytes) -> None:
        self.encoded.append(value)

    async def result(self, result: Result) -> None:
        self.results.append(result)

    @property
    def values(self) -> list[Any]:
        """The chunks, and for a failed job its error at the end."""
        assert len(self.results) == 1, "a job has exactly one result"
        chunks = [json.loads(value) for value in self.encoded]
        body = json.loads(self.results[0].body())
        if "error" in body:
            return [*chunks, {"error": body["error"]}]
        assert body == {"output": chunks}
        return chunks
