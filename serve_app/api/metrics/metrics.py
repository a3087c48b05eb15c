"""Metrics of one replica as Prometheus text: load, tokens, latencies, and the ends of requests.

If vLLM has the same metric, its name, unit and `model_name` are used, with `mixtral_` for `vllm:`.
The engine's counters are read at each scrape; prometheus_client stores the histograms (1 to 2 us
per token) and writes the text. No label contains data from a client.

The counting methods belong to one event loop; `text` is thread-safe. Counters begin at 0 when the
server is created, so they exclude the load's warm-up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from serve_app.api.metrics import histograms
from serve_app.errors import QueueFull, ServeError
from serve_app.protocol.key_account import KeyAccount

if TYPE_CHECKING:
    from prometheus_client import Histogram
    from prometheus_client.metrics_core import Metric

    from serve_app.engine.engine import EngineStats
    from serve_app.loading.phases import PhaseTime

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats/."""

STATUSES = ("idle", "loading", "ready", "draining", "failed")
"""The values of `status` in `/health`. A worker without a model has "idle", "loading" or
"failed"."""
NO_ROUTE = "none"
"""The label `handler` of responses to requests for a path that is not in the route table."""
FINISH_REASONS = ("stop", "length", "tool_calls", "cancelled", "error")

# Name, field of `EngineStats`, help.
GAUGES = (
    ("num_requests_running", "num_running", "Requests in the engine's steps."),
    ("num_requests_waiting", "num_waiting", "Requests in the engine's queue."),
    ("kv_blocks_used", "num_used_blocks", "KV blocks that requests hold."),
    ("kv_blocks", "num_blocks", "All KV blocks."),
)
COUNTERS = (
    ("prompt_tokens", "num_prompt_tokens", "Tokens of prompts."),
    ("generation_tokens", "num_generation_tokens", "Tokens that were generated."),
    (
        "prefix_cache_queries",
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache: prompts, and sequences after a preemption.",
    ),
    (
        "prefix_cache_hits",
        "prefix_cache_hits",
        "Tokens found in the prefix cache, and not computed.",
    ),
    ("num_preemptions", "num_preemptions", "Running requests preempted for a free KV block."),
    ("engine_steps", "num_steps", "Steps of the engine."),
    ("engine_step_seconds", "step_seconds", "Seconds in which the device computed steps."),
)

# By the name of the API key: name, field of `KeyAccount`, help.
KEY_COUNTERS = (
    ("key_requests", "num_requests", "Requests that generate, by API key."),
    ("key_prompt_tokens", "num_prompt_tokens", "Tokens of prompts, by API key."),
    ("key_generation_tokens", "num_generation_tokens", "Generated tokens, by API key."),
)


class Metrics:
    """The metrics of one server."""

    def __init__(
        self,
        model: str,
        stats: Callable[[], "EngineStats"],
        accounts: Callable[[], Iterable[KeyAccount]] = tuple,
        memory: Mapping[str, int] | None = None,
        phases: Sequence["PhaseTime"] = (),
    ) -> None:
        """`model` is the public name; `stats` returns the engine's counters, `accounts` the
        accounts of the API keys.

        `memory` (bytes by part) and `phases` are `memory` and `load` in `/health`.
        """
        from prometheus_client import CollectorRegistry, disable_created_metrics

        # Drops the series with creation times, for the whole process.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._model = model
        self._stats = stats
        self._accounts = accounts
        self._memory = memory or {}
        self._phases = phases
        self._begin = stats()
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self._errors = dict.fromkeys(_codes(ServeError), 0)
        self.http_responses: defaultdict[tuple[str, int], int] = defaultdict(int)
        """HTTP responses by path of the route table, or `NO_ROUTE`, and status."""
        self._histograms = CollectorRegistry()

        self.first_token = self._histogram(*histograms.FIRST_TOKEN)
        self.inter_token = self._histogram(*histograms.INTER_TOKEN)
        self.queue = self._histogram(*histograms.QUEUE)
        self.whole = self._histogram(*histograms.WHOLE)
        self.loop_lag = self._histogram(*histograms.LOOP_LAG)
        self.prompt_tokens = self._histogram(*histograms.PROMPT_TOKENS)
        self.generation_tokens = self._histogram(*histograms.GENERATION_TOKENS)

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> "Histogram":
        from prometheus_client import Histogram

        labelled = Histogram(
            f"mixtral_{name}", help, ["model_name"], buckets=buckets, registry=self._histograms
        )
        return labelled.labels(self._model)

    def error(self, error: ServeError) -> None:
        """Counts an error that a client gets."""
        code = _code(type(error))
        self._errors[code] = self._errors.get(code, 0) + 1

    def refused(self, number: int) -> None:
        """Counts requests that HAProxy refused while the queue was full."""
        self._errors[_code(QueueFull)] += number

    def text(self, status: str) -> str:
        """Returns all metrics in Prometheus' text format. `status` is the one in `/health`."""
        return _text(self.families(status))

    def families(self, status: str) -> Iterator["Metric"]:
        """Returns all metrics as prometheus_client's objects. Thread-safe."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        yield _status(status, self._model)
        now = self._stats()
        for name, field, help in GAUGES:
            gauge = GaugeMetricFamily(f"mixtral_{name}", help, labels=["model_name"])
            gauge.add_metric([self._model], getattr(now, field))
            yield gauge
        for name, field, help in COUNTERS:
            counter = CounterMetricFamily(f"mixtral_{name}", help, labels=["model_name"])
            counter.add_metric([self._model], getattr(now, field) - getattr(self._begin, field))
            yield counter
        for name, label, help, counts in (
            ("requests", "finish_reason", "Requests that ended.", self.finished),
            ("errors", "code", "Errors returned to clients.", self._errors),
        ):
            counter = CounterMetricFamily(f"mixtral_{name}", help, labels=["model_name", label])
            for value, count in counts.items():
                counter.add_metric([self._model, value], count)
            yield counter
        yield from self._start()
        counter = CounterMetricFamily(
            "mixtral_http_requests",
            "HTTP responses, by route and status.",
            labels=["model_name", "handler", "status"],
        )
        for (route, code), count in list(self.http_responses.items()):
            counter.add_metric([self._model, route, str(code)], count)
        yield counter
        accounts = list(self._accounts())
        for name, field, help in KEY_COUNTERS if accounts else ():
            counter = CounterMetricFamily(f"mixtral_{name}", help, labels=["model_name", "key"])
            for account in accounts:
                counter.add_metric([self._model, account.key.name], getattr(account, field))
            yield counter
        yield from self._histograms.collect()

    def _start(self) -> Iterator["Metric"]:
        """Returns the metrics of the load: seconds and memory."""
        from prometheus_client.metrics_core import GaugeMetricFamily

        help = "Seconds that a phase of the load took."
        seconds = GaugeMetricFamily(
            "mixtral_load_phase_seconds", help, labels=["model_name", "phase"]
        )
        for phase in list(self._phases):
            seconds.add_metric([self._model, phase["phase"]], phase["seconds"])
        yield seconds
        help = "Bytes of weights and KV cache on the device, by part."
        memory = GaugeMetricFamily("mixtral_memory_bytes", help, labels=["model_name", "part"])
        for part, num_bytes in self._memory.items():
            memory.add_metric([self._model, part], num_bytes)
        yield memory


def status_text(status: str, model: str) -> str:
    """Returns the only metric of a worker without a loaded model, its status, in Prometheus' text
    format."""
    return _text([_status(status, model)])


def _status(status: str, model: str) -> "Metric":
    from prometheus_client.metrics_core import GaugeMetricFamily

    help = "1 for the current status, 0 for the others."
    family = GaugeMetricFamily("mixtral_status", help, labels=["model_name", "status"])
    for value in STATUSES:
        family.add_metric([model, value], value == status)
    return family


def _text(families: Iterable["Metric"]) -> str:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Families(Collector):
        def collect(self) -> Iterable["Metric"]:
            return families

    registry = CollectorRegistry()
    registry.register(Families())
    return generate_latest(registry).decode()


def _code(kind: type[ServeError]) -> str:
    return kind.code or kind.type


def _codes(kind: type[ServeError]) -> Iterator[str]:
    """Yields the codes of all errors.

    Prometheus sees the first increase of a counter only if the counter began at 0.
    """
    yield _code(kind)
    for subclass in kind.__subclasses__():
        yield from _codes(subclass)
