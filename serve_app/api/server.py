"""MixtralServer: the deployment class, as a plain object. Owns tokenizer and engine.

Both doors hand it a `Call` and hear a `Reply`. Constructing one loads the model; nothing else does.
Knows no HTTP library, no Ray and no jobs.
"""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from serve_app.api import metrics
from serve_app.api.generation import Generator
from serve_app.api.metrics import Metrics
from serve_app.api.routes import Handler, Routes, known
from serve_app.config.settings import Settings
from serve_app.errors import (
    Draining,
    EngineDead,
    MethodNotAllowed,
    RouteNotFound,
    ServeError,
    error_body,
)
from serve_app.loading import load as loading
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.protocol.call import (
    BatchReply,
    Call,
    JsonReply,
    Reply,
    ReplyItem,
    StreamReply,
    TextReply,
)
from serve_app.protocol.fields import printable


class MixtralServer:
    """One loaded model and everything that can be asked of it."""

    def __init__(
        self, settings: Settings, load: Callable[[Settings, LoadLog], Loaded] = loading.load
    ) -> None:
        """Loads the model, which takes as long as it takes; raises `ModelLoadFailed`."""
        self.settings = settings
        load_log = LoadLog.resume(settings.load_log)
        self._loaded = load(settings, load_log)
        self.quantization = self._loaded.quantization
        self._engine = self._loaded.engine
        self._phases = load_log.phases
        self._is_draining = False
        self.metrics = Metrics(settings.model.served_model_names[0], self._engine.stats)
        generator = Generator(
            self._engine,
            self._loaded.tokenizer,
            settings.api,
            self._loaded.max_model_len,
            self._loaded.vocab_size,
            self.metrics,
        )
        self._routes = Routes(
            generator, settings.model.served_model_names, settings.engine.max_num_seqs
        )

    async def answer(self, call: Call) -> Reply:
        """Answers one call; raises a `ServeError` where it cannot.

        The first chunk of a stream is ready, so every refusal is raised from here.
        """
        try:
            return await self._handler(call)(call)
        except ServeError:
            raise
        except Exception as error:
            raise known(error, call.request_id) from error

    async def call(
        self, method: str, path: str, body: Any, request_id: str
    ) -> AsyncGenerator[ReplyItem, None]:
        """`answer` for a deployment handle: everything crosses as data, errors too.

        Closing the generator cancels the request.
        """
        try:
            match await self.answer(Call(method, path, body, request_id)):
                case JsonReply(body, status):
                    yield {"status": status, "body": body}
                case TextReply(text):
                    yield {"status": 200, "body": text}
                case BatchReply(items):
                    async with aclosing(items):
                        async for item in items:
                            yield item
                case StreamReply(first, rest):
                    async with aclosing(rest):
                        yield {"chunk": first}
                        async for chunk in rest:
                            yield {"chunk": chunk}
        except Exception as error:
            told = known(error, request_id)
            self.metrics.error(told)
            yield {"status": told.http_status, "error": error_body(told, request_id)}

    def drain(self) -> None:
        """From now on only what runs is finished; whatever would start is refused."""
        self._is_draining = True

    def check_health(self) -> None:
        """For Serve's health check: raises `EngineDead` when the replica must be replaced."""
        if not self._engine.is_alive:
            raise EngineDead("The engine has stopped; another replica can answer.")

    def close(self) -> None:
        """Stops the engine; requests that still run fail."""
        self._engine.stop()

    @property
    def _status(self) -> str:
        return "draining" if self._is_draining else "ready"

    def health(self) -> dict[str, Any]:
        """The `/health` object."""
        stats = self._engine.stats()
        return {
            "status": self._status,
            "model": {
                "id": self.settings.model.served_model_names[0],
                "quantization": self.settings.model.quantization,
                "dtype": self._loaded.dtype,
            },
            "memory": self._loaded.memory,
            "engine": {
                "running": stats.num_running,
                "waiting": stats.num_waiting,
                "kv_blocks_used": stats.num_used_blocks,
                "kv_blocks_total": stats.num_blocks,
            },
            "load": self._phases,
            "notes": self._loaded.notes,
        }

    def _handler(self, call: Call) -> Handler:
        """The route's handler; raises where there is none, or none for now."""
        found = self._status_route(call.path) or self._routes.find(call.path)
        if found is None:
            raise RouteNotFound(f"There is no route {printable(call.path)}.")
        method, handler = found
        if call.method != method:
            raise MethodNotAllowed(
                f"{printable(call.path)} takes {method}, not {printable(call.method)}.",
                allow=method,
            )
        self.check_health()
        if method == "POST" and self._is_draining:
            raise Draining(
                "The server is shutting down; send the request to another one.",
                retry_after_s=self.settings.api.retry_after_s,
            )
        return handler

    def _status_route(self, path: str) -> tuple[str, Handler] | None:
        if path == "/metrics":
            return "GET", self._show
        if path not in ("/health", "/ping"):
            return None

        async def handler(call: Call) -> Reply:
            body = self.health() if path == "/health" else {"status": self._status}
            return JsonReply(body, status=503 if self._is_draining else 200)

        return "GET", handler

    async def _show(self, call: Call) -> Reply:
        # Also while draining, which somebody may want to watch.
        return TextReply(self.metrics.text(self._status), metrics.CONTENT_TYPE)
