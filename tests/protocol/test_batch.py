"""Lines of OpenAI's batch format."""

import json
from typing import Any

import pytest
from openai.types.batch_error import BatchError

from serve_app.protocol.batch import BatchRequest, LineReader

URL = "/v1/chat/completions"
LINE: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": URL, "body": {"messages": []}}


def read(*lines: Any) -> Any:
    """Returns what the last of these lines is read as."""
    reader = LineReader([URL, "/prompt"])
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return [reader.read(number, text) for number, text in enumerate(texts, start=1)][-1]


def test_a_line_is_a_request() -> None:
    """The line as in OpenAI's guide is read, its body untouched; `method` may be left out."""
    assert read(LINE) == BatchRequest("a", URL, {"messages": []})
    assert read({name: LINE[name] for name in ("custom_id", "url", "body")}) == read(LINE)


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"\xff{}", "invalid_json_line", None),
        (b'{"custom_id": NaN}', "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        ([LINE], "invalid_json_line", None),
        (LINE | {"custom_id": ""}, "invalid_request", "custom_id"),
        (LINE | {"custom_id": 7}, "invalid_request", "custom_id"),
        (LINE | {"method": "GET"}, "invalid_request", "method"),
        (LINE | {"url": "/health"}, "invalid_request", "url"),
        (LINE | {"body": "Hello"}, "invalid_request", "body"),
        (LINE | {"bodies": {}}, "invalid_request", "bodies"),
        ({"custom_id": "a"}, "invalid_request", "url"),
    ],
)
def test_a_line_that_is_no_request_has_an_error(line: Any, code: str, param: str | None) -> None:
    """The result has no response, and OpenAI's `BatchError` with the line's number."""
    result = read(LINE | {"custom_id": "before"}, line)
    assert result["response"] is None
    assert set(result["error"]) == set(BatchError.model_fields)
    error = BatchError.model_validate(result["error"], strict=True)
    assert (error.code, error.line, error.param) == (code, 2, param)
    given = line.get("custom_id") if isinstance(line, dict) else None
    assert result["custom_id"] == (given if isinstance(given, str) else None)


def test_an_id_may_occur_once() -> None:
    """The second line with an id is an error, the first one is not."""
    result = read(LINE, LINE)
    assert (result["error"]["code"], result["error"]["line"]) == ("duplicate_custom_id", 2)
