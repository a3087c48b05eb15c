"""A worker with the real SDK and the real handler, and a model that follows the prompt's orders.

The prompt is how many tokens to say; `"hold"` says one and then waits for ever, `"flaky"` fails
the first two calls, which are one job and the handler's own second try, and `"refused"` is refused.
Starting takes as many seconds as the first argument says.
"""

import asyncio
import itertools
import logging
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from serve_app.errors import EngineDead, InvalidRequest, error_body
from serve_app.protocol.call import Call
from serve_app.worker import progress
from serve_app.worker.boot import Boot
from serve_app.worker.forward import Forward
from serve_app.worker.handler import Handler
from serve_app.worker.start import take_jobs

num_flaky = itertools.count()


async def say(call: Call) -> AsyncGenerator[dict[str, Any], None]:
    """Streams the tokens `0 `, `1 `, ... one every millisecond."""
    print("call", call.request_id, flush=True)
    if call.body["prompt"] == "flaky" and next(num_flaky) < 2:
        raise EngineDead("The model's process ended; send the request again.")
    if call.body["prompt"] == "refused":
        error = InvalidRequest("The prompt is refused.", param="prompt")
        yield {"status": 400, "error": error_body(error, call.request_id)}
        return
    try:
        yield {"status": 200, "stream": bool(call.body.get("stream")), "headers": {}}
        if not call.body.get("stream"):
            yield {"body": {"text": call.body["prompt"]}}
            return
        is_held = call.body["prompt"] == "hold"
        for n in itertools.count() if is_held else range(int(call.body["prompt"])):
            yield {"chunk": {"token": f"{n} ", "finished": False}}
            await asyncio.sleep(0.001)
            if is_held:
                await asyncio.Event().wait()
        yield {"chunk": {"token": "", "finished": True, "finish_reason": "length", "usage": {}}}
    finally:
        print("closed", call.request_id, flush=True)


async def start() -> Forward:
    await asyncio.sleep(float(sys.argv[1]))
    return say


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    load_log = Path(tempfile.mkdtemp()) / "load.jsonl"
    load_log.write_text('{"phase": "weights", "state": "done", "seconds": 0.5}\n')
    take_jobs(
        Handler(
            Boot(start),
            tell=progress.post,
            load_log=str(load_log),
            progress_interval_s=0.2,
            max_body_bytes=1_000_000,
        ),
        slots=8,
        drain_s=5,
    )
