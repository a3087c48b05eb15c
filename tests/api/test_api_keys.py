"""API keys in a file: who may ask, how much, and what others notice of it."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve_app.api.api_keys import POLL_S, ApiKeys
from serve_app.config.api_settings import ApiSettings
from serve_app.config.key_file import KeyLimits, add_key, remove_key, sha256
from serve_app.config.serve_config import ConfigError
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "model": "tiny"}
CHAT = "/v1/chat/completions"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def serve(endpoint: Endpoint, path: Path) -> Iterator[Any]:
    """Serves an engine with the keys of the file; ends the thread that follows the file."""

    def begin(engine: FakeEngine | None = None) -> FakeEngine:
        return endpoint.serve(engine, api={"keys_file": str(path)})

    yield begin
    endpoint.server.close()


def asked(http: httpx.Client, key: str, **fields: Any) -> httpx.Response:
    return http.post(CHAT, json=ASK | fields, headers={"Authorization": f"Bearer {key}"})


def until_status(http: httpx.Client, key: str, status: int) -> None:
    """Asks until the server has read the file again."""
    give_up = time.monotonic() + 20 * POLL_S
    while asked(http, key).status_code != status:
        assert time.monotonic() < give_up
        time.sleep(POLL_S / 20)


def test_the_server_follows_the_file(http: httpx.Client, path: Path, serve: Any) -> None:
    """A key works as soon as it is in the file, and is refused when it is removed; the others go
    on. A file that cannot be read changes nothing."""
    ann = add_key(path, "ann", KeyLimits())
    serve()
    assert asked(http, "wrong").status_code == 401
    assert asked(http, ann).status_code == 200
    bob = add_key(path, "bob", KeyLimits())
    until_status(http, bob, 200)
    remove_key(path, "ann")
    until_status(http, ann, 401)
    assert asked(http, bob).status_code == 200


def test_a_broken_file_keeps_the_keys(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log says why, once for each change; without a file at the start there is no server."""
    monkeypatch.setattr("serve_app.api.api_keys.POLL_S", 0.01)
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(ApiSettings(keys_file=str(path)))
    key = add_key(path, "ann", KeyLimits())
    keys = ApiKeys(ApiSettings(keys_file=str(path)))
    with caplog.at_level(logging.ERROR):
        for broken in ("{", None):
            caplog.clear()
            path.unlink() if broken is None else path.write_text(broken)
            give_up = time.monotonic() + 20
            while not caplog.records:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            assert keys.find(key) is not None
            assert "The API keys are unchanged" in caplog.text
    keys.close()


def test_every_change_of_the_file_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that has changed in place is read again, also where its size and its time of
    modification are as before."""
    monkeypatch.setattr("serve_app.api.api_keys.POLL_S", 0.01)
    key, other = add_key(path, "ann", KeyLimits()), "another key"
    keys = ApiKeys(ApiSettings(keys_file=str(path)))
    before = path.stat()
    path.write_text(path.read_text().replace(sha256(key), sha256(other)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    give_up = time.monotonic() + 20
    while keys.find(other) is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    assert keys.find(key) is None
    keys.close()


def test_requests_a_minute(endpoint: Endpoint, path: Path, serve: Any) -> None:
    """A client over its limit gets OpenAI's RateLimitError with Retry-After and the remaining
    amounts; another key has its own limit."""
    ann = add_key(path, "ann", KeyLimits(requests_per_minute=2))
    bob = add_key(path, "bob", KeyLimits(requests_per_minute=2))
    serve()
    with endpoint.client(ann) as client:
        for left in ("1", "0"):
            raw = client.chat.completions.with_raw_response.create(**ASK)
            assert raw.headers["x-ratelimit-limit-requests"] == "2"
            assert raw.headers["x-ratelimit-remaining-requests"] == left
            assert "x-ratelimit-limit-tokens" not in raw.headers
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**ASK)
        assert client.models.list().data  # what generates nothing is not limited
    assert refused.value.code == "rate_limit_exceeded"
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    assert refused.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert "'ann'" in str(refused.value)
    with endpoint.client(bob) as client:
        assert client.chat.completions.create(**ASK).choices


def test_tokens_a_minute(http: httpx.Client, path: Path, serve: Any) -> None:
    """Prompts and answers count; a request that begins may end, however long it is."""
    key = add_key(path, "ann", KeyLimits(tokens_per_minute=7))
    serve()
    usage = asked(http, key).json()["usage"]
    assert usage["total_tokens"] >= 7
    refused = asked(http, key)
    assert refused.status_code == 429
    assert "7 tokens a minute" in refused.json()["error"]["message"]
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"


@pytest.mark.parametrize("stream", [True, False])
def test_requests_at_once(http: httpx.Client, path: Path, serve: Any, stream: bool) -> None:
    """A stream counts until it ends or its client leaves; refused requests leave nothing behind."""
    key = add_key(path, "ann", KeyLimits(max_concurrent=1))
    engine = serve(FakeEngine(is_endless=True))
    with http.stream(
        "POST", CHAT, json=ASK | {"stream": True}, headers={"x-api-key": key}
    ) as running:
        lines = running.iter_lines()  # without a reference, httpx closes the connection
        next(lines)
        refused = asked(http, key, stream=stream)
        assert refused.status_code == 429
        assert "1 requests at once" in refused.json()["error"]["message"]
    assert engine.left.wait(20)
    serve()
    for _ in range(3):
        assert asked(http, key, stream=stream).status_code == 200
        assert asked(http, key, messages=[]).status_code == 400
        assert asked(http, key, n=2, stream=stream).status_code == 200


def test_a_key_is_the_group_of_its_requests(http: httpx.Client, path: Path, serve: Any) -> None:
    """Keys are groups that share the engine, and a key's `min_priority` limits that of its
    requests. A single key has no group."""
    ann = add_key(path, "ann", KeyLimits(min_priority=3))
    engine = serve()
    asked(http, ann, priority=-5)
    assert engine.scheduling_classes == [SchedulingClass("", 3)]
    bob = add_key(path, "bob", KeyLimits())
    engine = serve()
    for key, fields in ((ann, {}), (bob, {"priority": 7}), (bob, {"n": 2})):
        assert asked(http, key, **fields).status_code == 200
    assert engine.scheduling_classes == [
        SchedulingClass("ann", 3),
        SchedulingClass("bob", 7),
        SchedulingClass("bob"),
        SchedulingClass("bob"),
    ]
    assert asked(http, bob, priority=1.5).status_code == 400


def test_metrics_have_the_names_of_keys(http: httpx.Client, path: Path, serve: Any) -> None:
    """/metrics counts requests and tokens by the name of the key; no answer and no log line
    contains a key."""
    key = add_key(path, "ann", KeyLimits())
    serve()
    usage = asked(http, key).json()["usage"]
    text = http.get("/metrics").text
    label = '{key="ann",model_name="tiny"}'
    assert f"mixtral_key_requests_total{label} 1.0" in text
    for name, field in (("prompt", "prompt_tokens"), ("generation", "completion_tokens")):
        assert f"mixtral_key_{name}_tokens_total{label} {float(usage[field])}" in text
    assert key not in text


def test_without_keys_no_client_is_counted(endpoint: Endpoint, http: httpx.Client) -> None:
    """Without keys there are no limits, no rate limit headers, and no series by key."""
    engine = endpoint.serve()
    answer = http.post(CHAT, json=ASK)
    assert engine.scheduling_classes == [DEFAULT_CLASS]
    assert not any(name.startswith("x-ratelimit") for name in answer.headers)
    assert "mixtral_key_" not in http.get("/metrics").text
