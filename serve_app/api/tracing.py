"""Traces of answers by OpenTelemetry: `observability.otlp_traces_endpoint`.

An answer has a span with the attributes of OpenTelemetry's GenAI conventions
(https://opentelemetry.io/docs/specs/semconv/gen-ai/), with the child spans `queue`, `prefill` and
`decode`. All spans are written at the end of the answer from recorded times, so a token costs
nothing. Spans contain numbers, names and ids, but no text of a prompt, an answer or an error.
"""

import time
from typing import TYPE_CHECKING, Any

from serve_app.engine.sampling_params import SamplingParams
from serve_app.errors import as_serve_error
from serve_app.protocol.call import TRACEPARENT, Call

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SERVICE = "mixtral-serve"
"""The resource's `service.name`; OTEL_SERVICE_NAME changes it."""
SPANS = ("queue", "prefill", "decode")
"""The spans below an answer's own, in their order."""


class Tracing:
    """Records the spans of one model's answers."""

    def __init__(self, model: str, exporter: "SpanExporter") -> None:
        """`model` is the public name. A thread sends spans to `exporter` in batches."""
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self.model = model
        resource = Resource({"service.name": SERVICE}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer(SERVICE)

    @classmethod
    def to(cls, endpoint: str, model: str) -> "Tracing":
        """Returns a `Tracing` that sends spans to the URL `endpoint` by OTLP over HTTP."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return cls(model, OTLPSpanExporter(endpoint=endpoint))

    def close(self) -> None:
        """Sends the remaining spans."""
        self._provider.shutdown()


class AnswerTrace:
    """The times of one answer. Call `ended` or `failed` once, which writes the spans."""

    def __init__(
        self, tracing: Tracing, call: Call, params: SamplingParams, num_prompt_tokens: int
    ) -> None:
        self._tracing = tracing
        self._call = call
        self._operation = "text_completion" if call.path == "/v1/completions" else "chat"
        self._submitted = self._first = self._computed = 0.0
        self._attributes: dict[str, Any] = {
            "gen_ai.operation.name": self._operation,
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": tracing.model,
            "gen_ai.response.model": tracing.model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.input_tokens": num_prompt_tokens,
            "gen_ai.usage.output_tokens": 0,
            "http.route": call.path,
            "mixtral.request_id": call.request_id,
        }

    def submitted(self) -> None:
        """Records that the prompt is submitted to the engine now."""
        self._submitted = time.monotonic()

    def first_token(self, queued_s: float, num_cached_tokens: int) -> None:
        """Records the arrival of the first token, after `queued_s` seconds in the queue."""
        self._first = time.monotonic()
        self._computed = min(self._submitted + queued_s, self._first)
        self._attributes["gen_ai.usage.cache_read.input_tokens"] = num_cached_tokens

    def ended(self, finish_reason: str, num_tokens: int) -> None:
        """Writes the spans of a complete answer of `num_tokens` tokens."""
        self._write(finish_reason, num_tokens, None)

    def failed(self, error: BaseException, num_tokens: int) -> None:
        """Writes the spans of an answer that `error` has ended after `num_tokens` tokens."""
        if not isinstance(error, Exception):
            self._write("cancelled", num_tokens, None)
        else:
            serve_error = as_serve_error(error)
            self._write("error", num_tokens, serve_error.code or serve_error.type)

    def _write(self, finish_reason: str, num_tokens: int, error: str | None) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(
            {TRACEPARENT: self._call.traceparent or ""}
        )
        end = time.monotonic()
        # Our times are on the monotonic clock; spans need the time of day.
        offset_s = time.time() - end
        tracer = self._tracing.tracer

        def at(moment: float) -> int:
            return int((moment + offset_s) * 1e9)

        attributes = self._attributes | {
            "gen_ai.response.finish_reasons": [finish_reason],
            "gen_ai.usage.output_tokens": num_tokens,
        }
        span = tracer.start_span(
            f"{self._operation} {self._tracing.model}",
            parent,
            trace.SpanKind.SERVER,
            attributes,
            start_time=at(self._call.arrived),
        )
        if error is not None:
            span.set_attribute("error.type", error)
            span.set_status(trace.StatusCode.ERROR)
        inner = trace.set_span_in_context(span)
        times = (self._submitted, self._computed, self._first, end)
        if self._first:
            for name, began, ended in zip(SPANS, times[:-1], times[1:], strict=True):
                tracer.start_span(name, inner, start_time=at(began)).end(at(ended))
        span.end(at(end))
