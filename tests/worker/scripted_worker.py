"""A worker with the real SDK and the real handler. Its model does what the prompt says:

    "12"            answers with 12 tokens
    "hold"          answers with one token and then waits for ever
    "mute"          waits for ever
    "bytes 500"     answers with 500 bytes; streamed, in tokens of 100,000
    "nan", "deep"   answers with what JSON does not have
    "flaky 1"       fails its first two calls, which are one job and the handler's own second try
    "refused"       refuses the prompt
    "end 3"         ends the worker with exit code 3, and answers

`--start-s` is how long the first job waits for the model; the other options are the settings. The
worker's own pauses are a tenth of what they are elsewhere, so that tests of faults take less time.
"""

import argparse
import asyncio
import functools
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from serve_app.error_body import error_body
from serve_app.errors import EngineDead, InvalidRequest
from serve_app.node.client import Forward
from serve_app.protocol.call import Call
from serve_app.worker import backoff, poll, posts, supervisor
from serve_app.worker.handler import Handler
from serve_app.worker.job_loop import JobLoop
from serve_app.worker.result import LargeResults
from serve_app.worker.supervisor import StartupSupervisor

loops: list[JobLoop] = []
num_flaky: Counter[str] = Counter()


async def model(call: Call) -> AsyncGenerator[Any, None]:
    """Streams the tokens `0 `, `1 `, ... one every millisecond."""
    print("call", call.request_id, flush=True)
    try:
        order, _, number = str(call.body["prompt"]).partition(" ")
        is_stream = bool(call.body.get("stream"))
        if order == "flaky" and num_flaky[number] < 2:
            num_flaky[number] += 1
            raise EngineDead("The model's process has ended. Send the request again.")
        if order == "refused":
            error = InvalidRequest("The prompt is refused.", param="prompt")
            yield {"status": 400, "error": error_body(error, call.request_id)}
            return
        if order == "end":
            loops[0].end(int(number))
        if order == "mute":
            await asyncio.Event().wait()
        if not is_stream:
            yield {"status": 200, "body": {"text": _text(order, number, call.body["prompt"])}}
            return
        for token in _tokens(order, number):
            yield {"chunk": {"token": token, "finished": False}}
            await asyncio.sleep(0.001)
        if order == "hold":
            await asyncio.Event().wait()
        yield {"chunk": {"token": "", "finished": True, "finish_reason": "length", "usage": {}}}
    finally:
        print("closed", call.request_id, flush=True)


def _text(order: str, number: str, prompt: Any) -> Any:
    match order:
        case "bytes":
            return "x" * int(number)
        case "nan":
            return float("nan")
        case "deep":
            return functools.reduce(lambda inner, _: [inner], range(100_000), list[Any]())
    return prompt


def _tokens(order: str, number: str) -> list[str]:
    if order == "bytes":
        return ["x" * 100_000] * (int(number) // 100_000)
    return [
        f"{n} " for n in itertools.islice(itertools.count(), 1 if order == "hold" else int(order))
    ]


async def start(seconds: float) -> Forward:
    await asyncio.sleep(seconds)
    return model


def shorten_pauses() -> None:
    backoff.FIRST_S /= 10
    backoff.MAX_S /= 10
    poll.MIN_POLL_S /= 10
    poll.RATE_LIMIT_S /= 10
    posts.CHUNK_PAUSES_S = (posts.CHUNK_PAUSES_S[0] / 10, posts.CHUNK_PAUSES_S[1] / 10)
    supervisor.CONFIRM_S /= 10


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--start-s", type=float, default=0.0)
    parser.add_argument("--drain-s", type=float, default=5.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--volume", help="large results are kept here")
    parser.add_argument("--post-timeout-s", type=float, default=posts.RESULT_TIMEOUT_S)
    given = parser.parse_args()
    posts.RESULT_TIMEOUT_S = posts.CHUNK_TIMEOUT_S = given.post_timeout_s
    shorten_pauses()
    logging.basicConfig(level=logging.INFO)
    load_log = Path(tempfile.mkdtemp()) / "load.jsonl"
    load_log.write_text('{"phase": "read", "state": "done", "seconds": 0.5}\n')
    handler = Handler(
        StartupSupervisor(functools.partial(start, given.start_s)),
        load_log=str(load_log),
        progress_interval_s=0.2,
        max_body_bytes=1_000_000,
        model_name="scripted",
    )
    large_results = LargeResults("volume" if given.volume else "error", Path(given.volume or "."))
    loops.append(JobLoop(handler, given.slots, given.drain_s, large_results))
    return loops[0].run()


if __name__ == "__main__":
    raise SystemExit(main())
