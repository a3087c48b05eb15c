"""RequestMetrics: measures one prompt's answer from its arrival to its end."""

import time

from serve_app.api.metrics.metrics import Metrics
from serve_app.api.tracing import AnswerTrace
from serve_app.engine.delta import Delta
from serve_app.errors import InvalidRequest, Overloaded
from serve_app.protocol.key_account import KeyAccount


class RequestMetrics:
    """Measures one prompt's answer. Call `ended` or `failed` once.

    A request that is refused before its first token counts as an error only.
    """

    __slots__ = (
        "_account",
        "_arrived",
        "_last",
        "_metrics",
        "_num_prompt_tokens",
        "_num_tokens",
        "_trace",
    )

    def __init__(
        self,
        metrics: Metrics,
        num_prompt_tokens: int,
        arrived: float,
        account: KeyAccount | None = None,
        trace: AnswerTrace | None = None,
    ) -> None:
        """Create the object when the prompt is submitted to the engine.

        `arrived` is the request's arrival in seconds of `time.monotonic`. The tokens are charged to
        `account`, and the measured times are recorded in `trace`, if they are not None.
        """
        self._num_tokens = 0
        self._trace = trace
        if trace is not None:
            trace.submitted()
        self._account = account
        self._metrics = metrics
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived = arrived
        self._last: float | None = None

    def delta(self, delta: Delta) -> None:
        """Counts the tokens of a delta. They share the time since the last delta evenly."""
        if not (num_tokens := len(delta.token_ids)):
            return
        now = time.monotonic()
        self._num_tokens += num_tokens
        if self._account is not None:
            num_prompt_tokens = self._num_prompt_tokens if self._last is None else 0
            self._account.use_tokens(num_prompt_tokens, num_tokens)
        if self._last is not None:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - self._last) / num_tokens)
        else:
            self._metrics.first_token.observe(now - self._arrived)
            if delta.queued_s is not None:
                self._metrics.queue.observe(delta.queued_s)
            if self._trace is not None:
                self._trace.first_token(delta.queued_s or 0.0, delta.num_prompt_cached)
        self._last = now

    def ended(self, finish_reason: str, num_tokens: int) -> None:
        """Counts a complete answer of `num_tokens` tokens."""
        self._metrics.finished[finish_reason] += 1
        self._metrics.whole.observe(time.monotonic() - self._arrived)
        self._metrics.prompt_tokens.observe(self._num_prompt_tokens)
        self._metrics.generation_tokens.observe(num_tokens)
        if self._trace is not None:
            self._trace.ended(finish_reason, num_tokens)

    def failed(self, error: BaseException) -> None:
        """Counts an answer that `error` ended: a failure, or a generator closed by its consumer."""
        if self._trace is not None:
            self._trace.failed(error, self._num_tokens)
        if not isinstance(error, Exception):
            self._metrics.finished["cancelled"] += 1
        elif self._last is not None or not isinstance(error, InvalidRequest | Overloaded):
            self._metrics.finished["error"] += 1
