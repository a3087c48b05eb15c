"""OpenAI's batch format: one request per line of the input, one result per line of the output.

A request is `{"custom_id", "method", "url", "body"}`, a result `{"id", "custom_id", "response":
{"status_code", "request_id", "body"}, "error"}` (https://platform.openai.com/docs/guides/batch). A
request that was answered, even with an error, has a `response`. A line that is not a request has an
`error` with the fields of OpenAI's `BatchError`.
"""

import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal, NoReturn, TypedDict

from pydantic import StringConstraints

from serve_app.errors import InvalidRequest
from serve_app.protocol.call import JsonObject
from serve_app.protocol.field_errors import printable
from serve_app.protocol.field_types import Text
from serve_app.protocol.fields import Body

MAX_ID_CHARS = 512


class InvalidJsonLine(InvalidRequest):
    code = "invalid_json_line"


class DuplicateId(InvalidRequest):
    code = "duplicate_custom_id"


class RequestLine(Body):
    """The fields of one line of the input."""

    custom_id: Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_CHARS)]
    method: Literal["POST"] = "POST"
    url: Text
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One valid line of the input. Its body is not validated yet."""

    custom_id: str
    url: str
    body: JsonObject


class LineError(TypedDict):
    """The reason why a line of the input is not a request."""

    code: str
    line: int
    """The line number, from 1."""
    message: str
    param: str | None


class BatchResponse(TypedDict):
    status_code: int
    request_id: str
    body: Any


class BatchResult(TypedDict):
    """One line of the output; exactly one of `response` and `error` is not None."""

    id: str
    custom_id: str | None
    """None if the line has no valid `custom_id`."""
    response: BatchResponse | None
    error: LineError | None


class LineReader:
    """Reads the lines of one input, in which every `custom_id` may occur once."""

    def __init__(self, urls: Collection[str]) -> None:
        """`urls` are the paths that a request may have."""
        self._urls = urls
        self._ids: set[str] = set()

    def read(self, number: int, text: bytes) -> BatchRequest | BatchResult:
        """Returns the request in line `number`, or the error result of a line that is not a
        request."""
        value = None
        try:
            value = parsed_line(text)
            line = RequestLine.read(value)
            self._check(line)
        except InvalidRequest as error:
            return _failed_line(number, value, error)
        self._ids.add(line.custom_id)
        return BatchRequest(line.custom_id, line.url, line.body)

    def _check(self, line: RequestLine) -> None:
        if line.url not in self._urls:
            urls = ", ".join(self._urls)
            raise InvalidRequest(
                f"`url` should be one of {urls}, not {printable(line.url)}.", param="url"
            )
        if line.custom_id in self._ids:
            raise DuplicateId(
                f"`custom_id` {printable(line.custom_id)} occurs in an earlier line.",
                param="custom_id",
            )


def parsed_line(text: bytes) -> JsonObject:
    """Returns the JSON object in one line. Raises `InvalidJsonLine`."""
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidJsonLine("The line is not valid JSON in UTF-8.") from None
    if not isinstance(value, dict):
        raise InvalidJsonLine("The line should hold a JSON object.")
    return value


def response_result(custom_id: str, response: BatchResponse) -> BatchResult:
    """Returns the result of a request that was answered."""
    return {"id": _new_id(), "custom_id": custom_id, "response": response, "error": None}


def key(result: BatchResult) -> str | int:
    """Returns the key of a result: the `custom_id` of its request, or the number of a failed line.

    Raises `LookupError` or `TypeError` for an object that is not a result.
    """
    error = result["error"]
    value = result["custom_id"] if error is None else error["line"]
    if not isinstance(value, str if error is None else int):
        raise TypeError("no result")
    return value


def is_answered(result: BatchResult) -> bool:
    """Returns whether the result is an answer without an error."""
    response = result["response"]
    return response is not None and response["status_code"] < HTTPStatus.BAD_REQUEST


def _failed_line(number: int, value: Any, error: InvalidRequest) -> BatchResult:
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    failure: LineError = {
        "code": error.code or "invalid_request",
        "line": number,
        "message": error.message,
        "param": error.param,
    }
    custom_id = custom_id if isinstance(custom_id, str) else None
    return {"id": _new_id(), "custom_id": custom_id, "response": None, "error": failure}


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
