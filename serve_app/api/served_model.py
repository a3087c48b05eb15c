"""ServedModel: one loaded model, and the objects that the handlers of routes use.

It owns the tokenizer and the engine. `MixtralServer` adds the routes.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve_app import __version__
from serve_app.api.api_keys import ApiKeys
from serve_app.api.input_processor import InputProcessor
from serve_app.api.list_places import ListPlaces
from serve_app.api.loop_lag import LoopLag
from serve_app.api.metrics.metrics import Metrics
from serve_app.api.request_body import BodyReader
from serve_app.api.tracing import Tracing
from serve_app.config.settings import Settings
from serve_app.errors import EngineDead, ModelNotFound, ServeError, handle_error
from serve_app.loading import load as loading
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.protocol.call import Call
from serve_app.protocol.field_errors import printable
from serve_app.protocol.grammar import GrammarCompiler
from serve_app.protocol.response import ResponseMetadata

if TYPE_CHECKING:
    from serve_app.engine.engine import EngineStats
    from serve_app.engine.retry_after import Places


class ServedModel:
    """One loaded model, its settings, API keys, metrics and state."""

    def __init__(
        self, settings: Settings, load: Callable[[Settings, LoadLog], Loaded] = loading.load
    ) -> None:
        """Loads the model, which takes minutes for Mixtral. Raises `ModelLoadFailed`."""
        self.settings = settings
        self.keys = ApiKeys(settings.api)  # fails before the load, which takes minutes
        load_log = LoadLog.resume(settings.load_log)
        self._loaded = load(settings, load_log)
        self.quantization = self._loaded.quantization
        self._engine = self._loaded.engine
        self._phases = load_log.phases
        self.is_draining = self._has_ended = False
        self.created = int(time.time())
        """Time at which the model was loaded, in Unix seconds."""
        self.names = settings.model.served_model_names
        self.fingerprint = _fingerprint(settings, self._loaded)
        self.list_places = ListPlaces(self._engine, settings.engine.max_num_seqs)
        self.tokenizer = self._loaded.tokenizer
        self.metrics = Metrics(
            self.names[0],
            self._stats,
            lambda: self.keys.accounts,
            self._loaded.memory,
            self._phases,
        )
        self.loop_lag = LoopLag(self.metrics.loop_lag.observe)
        self.bodies = BodyReader(settings.api.max_body_bytes, settings.api.retry_after_s)
        endpoint = settings.observability.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing.to(endpoint, self.names[0])
        self.inputs = InputProcessor(
            self._engine,
            self.tokenizer,
            settings.api,
            self._loaded.max_model_len,
            self._loaded.vocab_size,
            self.metrics,
            GrammarCompiler(
                self.tokenizer.backend,
                self._loaded.vocab_size,
                self._engine.config.eos_token_ids,
                self.tokenizer.tool_calls_id,
            ),
            self._loaded.sampling_defaults,
            self.tracing,
        )

    def places(self) -> "Places":
        """Returns the numbers that a proxy needs to refuse generating requests itself."""
        return self._engine.places()

    def failure(self, error: Exception, request_id: str) -> ServeError:
        """Returns the client's error for any exception. Counts it, and logs it once."""
        serve_error = handle_error(error, request_id)
        self.metrics.error(serve_error)
        return serve_error

    def metadata(self, model: str | None, call: Call) -> ResponseMetadata:
        """Returns the metadata of the response. Raises `ModelNotFound` for another model's name."""
        if model is not None and model not in self.names:
            raise self._not_served(model)
        return ResponseMetadata(call.request_id, self.names[0], int(time.time()), self.fingerprint)

    def check_model(self, name: str | None) -> None:
        """Raises `ModelNotFound` if `name` is not a served name."""
        if name is not None and name not in self.names:
            raise self._not_served(name)

    def _not_served(self, name: str) -> ModelNotFound:
        return ModelNotFound(
            f"There is no model `{printable(name)}` here, only {', '.join(self.names)}.",
            param="model",
        )

    def drain(self) -> None:
        """Refuses new requests from now on; running ones finish."""
        self.is_draining = True

    def end_requests(self) -> None:
        """Ends the running and waiting requests with `Draining`. The server answers no more
        requests."""
        self.is_draining = self._has_ended = True
        self._engine.stop()

    def check_health(self) -> None:
        """Raises `EngineDead` if the replica must be replaced; Serve's health check calls it."""
        self._engine.end_if_hung()
        if not self._engine.is_alive and not self._has_ended:
            raise EngineDead("The engine has stopped; another replica can answer.")

    def close(self) -> None:
        """Stops the engine; requests that still run fail."""
        self.keys.close()
        if self.tracing is not None:
            self.tracing.close()
        self._engine.stop()

    def _stats(self) -> "EngineStats":
        """Returns the engine's numbers. List items that wait for their place count as waiting."""
        stats = self._engine.stats()
        return replace(stats, num_waiting=stats.num_waiting + self.list_places.num_waiting)

    @property
    def status(self) -> str:
        return "draining" if self.is_draining else "ready"

    def ping(self) -> tuple[dict[str, Any], int]:
        """Returns the body of `/ping` and its HTTP status."""
        return {"status": self.status}, 503 if self.is_draining else 200

    def health(self) -> dict[str, Any]:
        """Returns the body of `/health`."""
        stats = self._stats()
        return {
            "status": self.status,
            "model": {
                "id": self.names[0],
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


def _fingerprint(settings: Settings, loaded: Loaded) -> str:
    """Returns OpenAI's `system_fingerprint`, which changes if equal requests may get other
    answers."""
    model, names = settings.model, {"name", "revision", "quantize_lm_head"}
    facts = (__version__, model.model_dump_json(include=names), loaded.quantization, loaded.dtype)
    return f"fp_{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"
