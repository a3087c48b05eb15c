"""The metrics in `/metrics`, request by request. The engine is a script."""

import asyncio
import re
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from serve_app.api.metrics.metrics import FINISH_REASONS, STATUSES, Metrics, status_text
from serve_app.api.server import MixtralServer
from serve_app.engine.engine import EngineStats
from serve_app.errors import OutOfMemory, QueueFull
from tests.exposition import Shown
from tests.fakes import FakeEngine, answer, items, server, tokenizer

TEXT = "Hello there, my dear."
NUM_TOKENS = len(tokenizer().encode(TEXT, add_special_tokens=False))


async def shown(one: MixtralServer) -> Shown:
    (item,) = [item async for item in one.call("GET", "/metrics", None, "r0")]
    assert "body" in item
    assert item["status"] == 200
    assert isinstance(item["body"], str)
    return Shown(item["body"])


def after(fake: FakeEngine, path: str, *bodies: Any, **args: Any) -> Shown:
    """Returns what a new server shows when it has answered `bodies`; `args` are settings."""

    async def run() -> Shown:
        one = server(fake, **args)
        for body in bodies:
            await items(one, path, body)
        return await shown(one)

    return asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("engine", "body", "reason"),
    [
        (FakeEngine(TEXT), {}, "stop"),
        (FakeEngine(TEXT, reason="length"), {}, "length"),
        (FakeEngine(TEXT, is_endless=True), {"stop": "there"}, "stop"),
        (FakeEngine(TEXT, error=OutOfMemory("Full.")), {}, "error"),
        (FakeEngine(TEXT, error=RuntimeError("secret")), {}, "error"),
        (FakeEngine("", error=RuntimeError("secret")), {}, "error"),
        (FakeEngine(TEXT, is_endless=True), {"max_tokens": 500}, "error"),
    ],
    ids=["stop", "length", "stop string", "failed", "bug", "bug at once", "deadline"],
)
def test_every_request_ends_once(
    engine: FakeEngine, body: dict[str, Any], reason: str, stream: bool
) -> None:
    """The reason is the one that the client gets; only a complete answer counts as an answer."""
    args = {"api": {"request_timeout_s": 0.2}} if body == {"max_tokens": 500} else {}
    seen = after(engine, "/prompt", {"prompt": "a", "stream": stream, **body}, **args)
    assert seen.by("finish_reason", "requests_total") == {reason: 1}
    num_whole = int(reason in ("stop", "length"))
    for name in ("e2e_request_latency_seconds", "request_prompt_tokens"):
        assert seen(f"{name}_count") == num_whole


@pytest.mark.parametrize(
    ("path", "body", "num_left"),
    [
        ("/prompt", {"prompt": "a", "stream": True}, 1),
        ("/prompt", {"prompt": "a"}, 1),
        ("/prompt", {"prompts": ["a", "b"]}, 2),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}, 2),
    ],
)
def test_a_client_that_leaves_is_counted_once(path: str, body: Any, num_left: int) -> None:
    """A client that leaves counts every prompt of its request as cancelled, none as an error."""
    engine = FakeEngine(is_endless=True)

    async def leave() -> Shown:
        one = server(engine)

        async def ask() -> None:
            await items(one, path, {"max_tokens": 500, **body})

        task = asyncio.create_task(ask())
        for _ in range(1000):  # turns of the event loop
            await asyncio.sleep(0)
        assert engine.num_running == num_left
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await shown(one)

    seen = asyncio.run(leave())
    assert seen.by("finish_reason", "requests_total") == {"cancelled": num_left}
    assert seen.by("code", "errors_total") == {}


def test_a_stream_that_is_closed_is_cancelled() -> None:
    """Closing the generator in the middle of the chunks counts one cancelled request."""

    async def leave() -> Shown:
        one = server(FakeEngine(is_endless=True))
        body = {"prompt": "a", "stream": True, "max_tokens": 500}
        call: AsyncGenerator[Any, None] = one.call("POST", "/prompt", body, "r1")
        await anext(call)
        await anext(call)
        await call.aclose()
        return await shown(one)

    assert asyncio.run(leave()).by("finish_reason", "requests_total") == {"cancelled": 1}


@pytest.mark.parametrize(
    ("body", "codes"),
    [
        ({"prompt": "a", "colour": 1}, {"invalid_request_error": 1}),
        ({"prompt": "a", "model": "other"}, {"model_not_found": 1}),
        ({"prompt": "a", "max_tokens": 5000}, {"context_length_exceeded": 1}),
        ({"prompts": ["a", {"x": 1}], "stream": True}, {"invalid_request_error": 1}),
        ({"prompts": [{"x": 1}, {"prompt": "a", "model": "other"}, {}]}, None),
    ],
)
def test_a_refusal_is_an_error_and_no_request(body: Any, codes: dict[str, int] | None) -> None:
    """A refusal counts as an error by its code; every refused item of a list counts."""
    seen = after(FakeEngine(), "/prompt", body)
    wanted = {"invalid_request_error": 2, "model_not_found": 1} if codes is None else codes
    assert seen.by("code", "errors_total") == wanted
    assert seen.by("finish_reason", "requests_total") == {}


@pytest.mark.parametrize("stream", [True, False])
def test_a_full_queue_is_an_error_and_no_request(stream: bool) -> None:
    """The engine has refused it, so nothing began and nothing ended."""
    engine = FakeEngine("", error=QueueFull("Full.", retry_after_s=1))
    seen = after(engine, "/prompt", {"prompt": "a", "stream": stream})
    assert seen.by("code", "errors_total") == {"queue_full": 1}
    assert seen.by("finish_reason", "requests_total") == {}


def test_failures_are_counted_by_their_code() -> None:
    """In a stream's middle too, once each."""
    engine = FakeEngine(TEXT, error=OutOfMemory("Full."))
    seen = after(engine, "/prompt", {"prompt": "a"}, {"prompt": "a", "stream": True})
    assert seen.by("code", "errors_total") == {"out_of_memory": 2}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tokens_and_what_lies_between_them(size: int) -> None:
    """One first token a request; a gap for each token after the first delta, however they came."""
    seen = after(FakeEngine(TEXT, size=size), "/prompt", *[{"prompt": "a"}] * 3)
    assert seen("time_to_first_token_seconds_count") == 3
    assert seen("inter_token_latency_seconds_count") == 3 * (NUM_TOKENS - size)
    assert seen("request_generation_tokens_sum") == 3 * NUM_TOKENS
    assert seen("request_prompt_tokens_count") == 3
    total = seen("e2e_request_latency_seconds_sum")
    first, between = (
        seen("time_to_first_token_seconds_sum"),
        seen("inter_token_latency_seconds_sum"),
    )
    assert 0 < first < first + between <= total


def test_the_first_token_is_counted_from_the_calls_arrival() -> None:
    """The time includes the wait of an item in a long list."""
    wait_s = 0.05

    class Slow(FakeEngine):
        async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
            await asyncio.sleep(wait_s)
            async for delta in super().generate(*args, **kwargs):
                yield delta

    body = {"prompts": ["a", "b", "c"]}
    seen = after(Slow(), "/prompt", body, engine={"max_num_seqs": 1})
    assert seen("time_to_first_token_seconds_sum") >= (1 + 2 + 3) * wait_s


def test_labels_hold_nothing_of_a_client() -> None:
    """No label holds a text, an id or a name that a client has sent."""
    body = {"prompt": "my words", "model": "my model", "user": "me"}

    async def run() -> Shown:
        one = server()
        for path in ("/prompt", "/my/route"):
            await items(one, path, body)
        await items(one, "/prompt", {"prompt": "my words", "stop": "my stop"})
        return await shown(one)

    seen = asyncio.run(run())
    assert seen.by("code", "errors_total") == {"model_not_found": 1, "not_found": 1}
    codes = seen.labels.pop("code")
    assert all(re.fullmatch("[a-z_]+", code) for code in codes)
    assert {name: values for name, values in seen.labels.items() if name != "code"} == {
        "model_name": {"tiny"},
        "status": set(STATUSES),
        "finish_reason": set(FINISH_REASONS),
        "part": {"experts", "attention", "head", "other", "kv_cache"},
    }


def test_it_is_shown_while_draining() -> None:
    """`/metrics` answers 200 while draining, so that a scrape sees how the last requests end."""

    async def drain() -> Shown:
        one = server()
        one.drain()
        return await shown(one)

    assert asyncio.run(drain()).by("status", "status") == {"draining": 1}


def test_a_model_that_is_not_there_shows_its_status() -> None:
    """In the series that a server shows, and nothing else: there is nothing to count."""
    seen = Shown(status_text("loading", "tiny"))
    assert list(seen.families) == ["mixtral_status"]
    assert seen.by("status", "status") == {"loading": 1}


def test_it_has_one_method() -> None:
    """A POST is a 405, as for the other routes that are read."""
    assert asyncio.run(answer(server(), "/metrics", {}))["error"]["message"] == (
        "/metrics takes GET, not POST."
    )


def test_the_page_names_every_metric() -> None:
    """docs/metrics.md has a row for each that there is, and for no other."""
    page = Path("docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `(mixtral_\w+)`", page, re.MULTILINE))
    families = asyncio.run(shown(server())).families.values()
    assert documented == {f"{f.name}_total" if f.type == "counter" else f.name for f in families}


def test_a_scrape_does_not_block_the_event_loop() -> None:
    """With thousands of API keys the text takes long, so another thread writes it."""
    one = server(FakeEngine(TEXT))
    threads: list[threading.Thread] = []

    def stats() -> EngineStats:
        threads.append(threading.current_thread())
        return FakeEngine(TEXT).stats()

    one.metrics = Metrics("tiny", stats)
    threads.clear()
    asyncio.run(shown(one))
    assert threads
    assert threading.current_thread() not in threads
