"""A model that answers calls from scripts, and a handler for it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from serve_app.node.client import Forward
from serve_app.protocol.call import Call
from serve_app.worker.handler import Handler
from serve_app.worker.supervisor import StartupSupervisor

Items = list[dict[str, Any] | Exception]
HandlerOf = Callable[[Forward | Exception], Handler]

TOKENS: Items = [{"chunk": {"token": t, "finished": False}} for t in "abc"]
LAST = {"token": "", "finished": True, "finish_reason": "stop", "usage": {"total_tokens": 4}}


class Model:
    """Answers each call with the next of `scripts`, and records the calls.

    It raises an item that is an exception, and waits for ever at `{"wait": None}`.
    """

    def __init__(self, *scripts: Items) -> None:
        self.scripts = list(scripts)
        self.calls: list[Call] = []
        self.num_closed = 0

    async def __call__(self, call: Call) -> AsyncGenerator[Any, None]:
        self.calls.append(call)
        try:
            for item in self.scripts.pop(0):
                if isinstance(item, Exception):
                    raise item
                if "wait" in item:
                    await asyncio.Event().wait()
                yield item
                await asyncio.sleep(0)
        finally:
            self.num_closed += 1


def scripted_handler(folder: Path, model: Forward | Exception) -> Handler:
    """Returns the handler of `model`, with its load log in `folder`; no model starts for an
    exception."""

    async def start() -> Forward:
        await asyncio.sleep(0.01)
        if isinstance(model, Exception):
            raise model
        return model

    return Handler(
        StartupSupervisor(start),
        load_log=str(folder / "load.jsonl"),
        progress_interval_s=0.1,
        max_body_bytes=10**6,
        model_name="tiny",
    )
