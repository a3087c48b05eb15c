"""The posts of a job, recorded instead of sent."""

import asyncio
import json
import uuid
from typing import Any

from serve_app.worker.handler import Handler
from serve_app.worker.result import Result


class RecordedPosts:
    """Remembers what a handler posts for one job."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Any]] = []
        self.encoded: list[bytes] = []
        self.results: list[Result] = []
        self.request_id = uuid.uuid4().hex
        self.last_chunk: dict[str, Any] = {}

    async def progress(self, update: dict[str, Any]) -> None:
        self.updates.append(update)

    async def chunk(self, value: bytes) -> None:
        self.encoded.append(value)

    async def result(self, result: Result) -> None:
        self.results.append(result)

    @property
    def chunks(self) -> list[Any]:
        return [json.loads(value) for value in self.encoded]

    @property
    def output(self) -> Any:
        """The output of the job, which must have succeeded."""
        body = self._body()
        assert body.keys() == {"output"}
        if self.results[0].is_list:
            assert body["output"] == self.chunks
        else:
            assert self.chunks == []
        return body["output"]

    @property
    def error(self) -> dict[str, Any]:
        """The error of the job, which must have failed: one JSON string."""
        body = self._body()
        assert isinstance(body["error"], str)
        error: dict[str, Any] = json.loads(body["error"])["error"]
        assert error.keys() == {"message", "type", "param", "code", "status", "retry", "request_id"}
        assert body["output"].keys() == {"status", "retry", "message"}
        assert all(body["output"][name] == error[name] for name in ("status", "retry"))
        return error

    def _body(self) -> dict[str, Any]:
        assert len(self.results) == 1, "a job has exactly one result"
        body: dict[str, Any] = json.loads(self.results[0].body())
        return body


def posts_of(handler: Handler, given: Any) -> RecordedPosts:
    """Returns all that is posted for a job with the input `given`."""
    posts = RecordedPosts()
    asyncio.run(handler.answer({"id": "job-1", "input": given}, posts))
    return posts
