"""`GET /metrics` over HTTP after real requests to the tiny model."""

import time
from collections.abc import Iterator

import httpx
import pytest

from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from serve_app.errors import OutOfMemory
from tests.api.conftest import Endpoint
from tests.exposition import Shown
from tests.fakes import FakeEngine

GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    server = MixtralServer(Settings.from_yaml("configs/tiny.yaml"))
    yield server
    server.close()


@pytest.fixture
def http(running: Endpoint, tiny: MixtralServer) -> Iterator[httpx.Client]:
    """A client of the tiny model."""
    running.server = tiny
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def scrape(http: httpx.Client) -> Shown:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Shown(response.text)


def test_a_new_server_has_counted_nothing() -> None:
    """The load's warm-up is not counted; all counters exist, at 0."""
    server = MixtralServer(Settings.from_yaml("configs/tiny.yaml"))
    try:
        assert server._engine.stats().num_generation_tokens > 0
        seen = Shown(server.metrics.text("ready"))
    finally:
        server.close()
    counters = [family for family in seen.families.values() if family.type == "counter"]
    assert len(counters) == 10
    assert {sample.value for family in counters for sample in family.samples} == {0}


def test_one_request_is_one_in_everything(http: httpx.Client) -> None:
    """The tokens are those of its usage; each time is within the time that it took."""
    before = scrape(http)
    began = time.monotonic()
    answer = http.post("/prompt", json={"prompt": "Hello", "max_tokens": 12, **GREEDY}).json()
    took = time.monotonic() - began + 0.001  # the resolution of an event loop's clock
    after = scrape(http)

    def grown(name: str, **labels: str) -> float:
        return after(name, **labels) - before(name, **labels)

    usage = answer["usage"]
    assert grown("requests_total", finish_reason="length") == 1
    for name in ("prompt_tokens_total", "request_prompt_tokens_sum", "prefix_cache_queries_total"):
        assert grown(name) == usage["prompt_tokens"]
    for name in ("generation_tokens_total", "request_generation_tokens_sum"):
        assert grown(name) == usage["completion_tokens"] == 12
    assert grown("engine_steps_total") >= 12
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert grown(f"{name}_seconds_count") == 1
        assert 0 < grown(f"{name}_seconds_sum") <= took
    # Tokens that were taken with the first one have no time of their own.
    assert grown("inter_token_latency_seconds_count") <= 11
    assert grown("num_requests_running") == grown("kv_blocks_used") == 0
    assert after("kv_blocks") > 0


def test_a_shared_prefix_is_counted(http: httpx.Client) -> None:
    """A repeated prompt hits all its full blocks, save the one that its last token needs."""
    body = {"prompt": "Say it again, and once more, please: " * 8, "max_tokens": 1, **GREEDY}
    num_prompt = http.post("/prompt", json=body).json()["usage"]["prompt_tokens"]
    before = scrape(http)
    http.post("/prompt", json=body)
    after = scrape(http)
    hits = after("prefix_cache_hits_total") - before("prefix_cache_hits_total")
    assert hits == (num_prompt - 1) // 16 * 16 > 0
    queries = after("prefix_cache_queries_total") - before("prefix_cache_queries_total")
    assert queries == num_prompt


def test_a_stream_that_is_left_is_cancelled_once(http: httpx.Client) -> None:
    """While it runs it is seen to run and to hold blocks; when it is left, it ends as cancelled."""
    before = scrape(http)
    body = {"prompt": "Hello", "stream": True, "max_tokens": 12_000, **GREEDY}
    with http.stream("POST", "/prompt", json=body) as response:
        received = response.iter_bytes()
        next(received)
        during = scrape(http)
        assert during("num_requests_running") == 1
        assert during("kv_blocks_used") > 0
    end = time.monotonic() + 10
    while scrape(http)("kv_blocks_used") > 0:
        assert time.monotonic() < end
    after = scrape(http)
    reasons = [one.by("finish_reason", "requests_total") for one in (before, after)]
    assert reasons[1] == reasons[0] | {"cancelled": reasons[0].get("cancelled", 0) + 1}
    assert after.by("code", "errors_total") == before.by("code", "errors_total")


def test_a_stream_that_fails_is_one_error(running: Endpoint) -> None:
    """A stream that fails after status 200 counts as an error and as a finished request."""
    running.serve(FakeEngine(error=OutOfMemory("Full.")))
    with httpx.Client(base_url=running.url) as http:
        assert http.post("/prompt", json={"prompt": "a", "stream": True}).status_code == 200
        seen = scrape(http)
    assert seen.by("code", "errors_total") == {"out_of_memory": 1}
    assert seen.by("finish_reason", "requests_total") == {"error": 1}


def test_the_endpoints_own_refusals_are_counted(
    running: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, sizes, JSON and routes, by code; a scrape needs no key."""
    monkeypatch.setenv("API_KEYS", "secret")
    running.serve(api={"max_body_bytes": 2000})
    with httpx.Client(base_url=running.url) as http:
        http.post("/prompt", json={"prompt": "a"})
        key = {"Authorization": "Bearer secret"}
        http.post("/prompt", content=b"x" * 3000, headers=key)
        http.post("/prompt", content=b"{", headers=key)
        http.post("/nowhere", json={}, headers=key)
        http.post("/v1/completions", json={"prompt": "a", "stream": True, "x": 1}, headers=key)
        seen = scrape(http)
        for handler, status in (("/prompt", 401), ("/prompt", 413), ("/metrics", 200)):
            labels = {"handler": handler, "status": str(status)}
            assert scrape(http)("http_requests_total", **labels) >= 1
        assert seen("http_requests_total", handler="none", status="404") == 1
        assert seen.by("code", "errors_total") == {
            "invalid_api_key": 1,
            "request_too_large": 1,
            "invalid_request_error": 2,
            "not_found": 1,
        }
