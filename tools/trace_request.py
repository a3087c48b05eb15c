"""Counts the functions of this package that one request runs, between the client and the engine.

    python -m tools.trace_request            # this checkout
    python tools/trace_request.py --list     # another checkout on PYTHONPATH; names each function

Four paths, with the tiny model in this process: a chat request from its HTTP bytes to the engine's
queue, and from the engine's delta to the HTTP bytes, streamed or not; and a RunPod job with a
prompt, from the worker's handler to the bytes of its result. Ray is replaced by a stand-in for the
deployment handle that calls the server directly. The engine's own thread is not counted.

Two numbers each. `functions`: different functions that run, so that merging two functions into
one is the only way to lower it without shortening the path. `frames`: calls, and resumptions of
suspended coroutines and generators. A comprehension counts as a part of its function.
"""

import argparse
import asyncio
import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import serve_app

PACKAGE = Path(serve_app.__file__).parent
CHAT = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "temperature": 0}
STREAM = {**CHAT, "stream": True, "max_tokens": 300, "ignore_eos": True}
TIMERS = {"LoopLag._measure", "LoopLag._wait"}
"""Functions of a timer that may run while a request waits."""
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


class Tracer:
    """Records every frame of the package that begins or goes on in the calling thread."""

    def __init__(self) -> None:
        self.frames: list[CodeType] = []

    def __enter__(self) -> "Tracer":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        is_ours = event == "call" and code.co_filename.startswith(str(PACKAGE))
        if is_ours and code.co_name not in COMPREHENSIONS and code.co_qualname not in TIMERS:
            self.frames.append(code)


def summary(frames: list[CodeType]) -> dict[str, Any]:
    """Counts of `frames`, and the names of their functions in the order of their first calls."""
    functions = list(dict.fromkeys(frames))
    kinds = [code.co_flags & inspect.CO_ASYNC_GENERATOR for code in functions]
    return {
        "functions": len(functions),
        "frames": len(frames),
        "files": len({code.co_filename for code in functions}),
        "async_generators": sum(map(bool, kinds)),
        "names": [
            f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"
            for code in functions
        ],
    }


def find(name: str) -> Any:
    """Returns the class or function `name` of the package, in any module: checkouts differ in
    modules."""
    pattern = re.compile(rf"^(class|def|async def) {name}\b", re.MULTILINE)
    for path in sorted(PACKAGE.rglob("*.py")):
        if pattern.search(path.read_text(encoding="utf-8")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            return getattr(importlib.import_module(".".join(parts)), name)
    raise LookupError(name)


async def over_http(app: Any, body: dict[str, Any]) -> list[list[CodeType]]:
    """Returns the frames before each message that the app sends, after a first request to warm up.

    The first list has the frames up to the first wait for the engine.
    """
    content = json.dumps(body).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(content)),
        ],
    }
    marks: list[int] = []
    tracer = Tracer()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(_: Any) -> None:
        marks.append(len(tracer.frames))

    with tracer:
        await app(scope, receive, send)
    marks = sorted([num_frames_in(tracer.frames), *marks])
    return [tracer.frames[a:b] for a, b in zip([0, *marks[:-1]], marks, strict=True)]


def num_frames_in(frames: list[CodeType]) -> int:
    """Returns the number of frames until the request waits for the engine."""
    return [code.co_qualname for code in frames].index("Stream.next") + 1


class Handle:
    """A replacement for a deployment handle, whose calls run the server in this process."""

    def __init__(self, server: Any) -> None:
        self.call = self
        self._server = server

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *arguments: Any) -> "Items":
        return Items(self._server.call(*arguments))


class Items:
    """A replacement for the response of a handle."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self._items

    def cancel(self) -> None: ...


class Posts:
    """A replacement for the posts of one job."""

    request_id = "request-1"

    def __init__(self) -> None:
        self.last_chunk: dict[str, Any] = {}

    async def chunk(self, value: bytes) -> None: ...

    async def progress(self, update: dict[str, Any]) -> None: ...

    async def result(self, result: Any) -> None:
        result.body()


def handler(server: Any) -> tuple[Any, Callable[[dict[str, Any]], Awaitable[None]]]:
    """Returns a supervisor of a ready model, and a function that answers one job as the worker
    does."""
    client = find("DeploymentClient")(Handle(server), 60.0)

    async def start() -> Any:
        return client

    supervisor = find("StartupSupervisor")(start)
    kwargs: dict[str, Any] = {
        "load_log": str(Path(tempfile.mkdtemp(), "load.jsonl")),
        "progress_interval_s": 1.0,
        "max_body_bytes": 10**6,
        "model_name": "tiny",
    }
    made = find("Handler")(supervisor, **kwargs)
    return supervisor, lambda job: made.answer(job, Posts())


async def measure(server: Any) -> dict[str, Any]:
    """Measures all paths. Returns `summary` of each by the path's name."""
    app = find("create_app")(lambda: server)
    one = {**CHAT, "max_tokens": 1}
    await over_http(app, one)
    whole_in, *whole_back = await over_http(app, one)
    stream_in, *stream_back = await over_http(app, STREAM)
    supervisor, answer = handler(server)
    await supervisor.ready()
    job = {"id": "job-1", "input": {"prompt": "What is 2 + 3?", "max_tokens": 1}}
    await answer(job)
    with Tracer() as tracer:
        await answer(job)
    # Without the beginning (status, role, first text) and the end (text, reason, [DONE], empty
    # body). The shortest, because a busy engine merges tokens into larger deltas.
    delta = min(stream_back[3:-4], key=len)
    return {
        "chat, in": summary(whole_in),
        "chat, back": summary([code for frames in whole_back for code in frames]),
        "streamed chat, in": summary(stream_in),
        "streamed chat, back, one delta": summary(delta),
        "job": summary(tracer.frames),
    }


def main() -> int:
    """Returns the command."""
    parser = argparse.ArgumentParser(prog="python -m tools.trace_request", description=__doc__)
    parser.add_argument("--list", action="store_true", help="name the functions too")
    options = parser.parse_args()
    server = find("MixtralServer")(find("Settings").from_yaml("configs/tiny.yaml"))
    try:
        found = asyncio.run(measure(server))
    finally:
        server.close()
    for path, counts in found.items():
        names = counts.pop("names")
        print(f"{path}: {counts}")
        if options.list:
            print("".join(f"    {name}\n" for name in names), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
