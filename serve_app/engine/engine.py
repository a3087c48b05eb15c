"""Engine: the asyncio interface of `EngineCore` and its thread. It maps token ids to deltas.

Every accepted request ends exactly once: with `stop`, with `length`, with its own error, or because
its consumer closed the generator. A failed step ends only the sequences in it. Three failed steps
in a row, or a step that does not return, end the engine. The thread sleeps while there is no
request.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from threading import Thread

from serve_app.engine.admission import admit
from serve_app.engine.core import EngineCore
from serve_app.engine.delta import Delta
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.runner import Runner
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass
from serve_app.engine.sequence import SharedPrompt
from serve_app.engine.stream import Stream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """Current numbers of sequences and KV blocks, and counters since the start."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_generation_tokens: int
    num_prompt_tokens: int
    prefix_cache_queries: int
    """Tokens looked up in the prefix cache, for new prompts and for sequences that resume after a
    preemption."""
    prefix_cache_hits: int
    """Tokens found in the prefix cache and not computed again."""
    num_preemptions: int
    num_steps: int
    step_seconds: float
    """Total device time of the steps, in seconds."""


class Engine:
    """Continuous batching over one runner."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self.config = config
        self.runner = runner
        """The runner. Other threads may use it only after `stop` has returned."""
        self._vocab_size = runner.vocab_size
        self._requests = RequestQueue(config.max_num_seqs, config.max_waiting, config.retry_after_s)
        self.require_room = self._requests.require_room
        """Raises the error with which a new request would be refused now. Thread-safe."""
        self.places = self._requests.places
        """Returns the numbers that a proxy needs to refuse requests itself. Thread-safe."""
        self._core = EngineCore(runner, config, self._requests)
        self._thread = Thread(target=self._core.run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all requests with `Draining` after the current step, and waits for the thread.

        If the step does not return, the requests end with `EngineDead`, and the thread stays in the
        step.
        """
        self._requests.stop()
        if not self._thread.is_alive():
            return
        limit_s = self._core.watchdog.limit_s
        self._thread.join(limit_s)
        if self._thread.is_alive():
            log.critical(
                "The engine's thread did not end within %.0f s of the stop, because its step does "
                "not return; its requests end now. The process should end soon.",
                limit_s,
            )
            self._core.live.abandon()

    def end_if_hung(self) -> None:
        """Ends all requests with `EngineDead` if a step does not return; see `Watchdog`.

        The thread stays in the step, so the process should end soon.
        """
        if self._core.watchdog.has_hung and not self._requests.has_failed:
            log.critical("The engine ends: one of its steps does not return.")
            self._core.live.abandon()

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs and accepts requests."""
        return self._thread.is_alive() and not self._requests.has_failed

    def stats(self) -> EngineStats:
        """Returns numbers for metrics. Thread-safe."""
        core, scheduler = self._core, self._core.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + self._requests.num_waiting,
            num_used_blocks=core.blocks.num_used,
            num_blocks=core.blocks.num_blocks,
            num_generation_tokens=core.live.num_generation_tokens,
            num_prompt_tokens=core.num_prompt_tokens,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_preemptions=scheduler.num_preemptions,
            num_steps=core.num_steps,
            step_seconds=core.step_seconds,
        )

    def check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        """Raises `InvalidRequest` or `ContextLengthExceeded` for a request that can never run."""
        admit(prompt_ids, params, self.config, self._vocab_size)

    def take_place(self, group: str = "") -> None:
        """Reserves a place in the request queue for a list of prompts.

        Raises the errors of `require_room`. Call `free_place` when the list has ended.
        """
        self._requests.take_place(group)

    def free_place(self, group: str = "") -> None:
        """Frees the place of a list of prompts."""
        self._requests.free_place(group)

    @property
    def num_taken(self) -> int:
        """Number of places in the request queue that single requests and lists hold."""
        return self._requests.num_taken

    async def generate(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        deadline: float | None = None,
        scheduling_class: SchedulingClass = DEFAULT_CLASS,
        *,
        is_list_item: bool = False,
        shared_prompt: SharedPrompt | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yields a request's tokens as deltas; the last delta has the finish reason.

        The first iteration raises `InvalidRequest` or `ContextLengthExceeded` if the request can
        never run, and `QueueFull`, `Draining` or `EngineDead` if it cannot run now.
        Items of an accepted list (`is_list_item`) never raise `QueueFull`. Requests with the same
        `shared_prompt` object have the same prompt, which is computed once.

        Later iterations raise the request's own error, or `DeadlinePassed` at `deadline`, a time on
        the event loop's clock. Closing the generator or cancelling its task frees the KV blocks
        before the next step.
        """
        sequence = admit(prompt_ids, params, self.config, self._vocab_size)
        stream = Stream(asyncio.get_running_loop())
        sequence.is_list_item, sequence.shared_prompt = is_list_item, shared_prompt
        sequence.scheduling_class = scheduling_class
        self._requests.submit(sequence, stream)
        # One timer per request; a timeout for each wait would cost more.
        timer = None if deadline is None else stream.loop.call_at(deadline, stream.expire)
        has_ended = False
        try:
            while not has_ended:
                delta = await stream.next()
                # After its deadline the sequence still runs; `finally` aborts it.
                has_ended = delta.finish_reason not in (None, "cancelled")
                delta.queued_s = sequence.queued_s
                delta.num_prompt_cached = sequence.num_prompt_cached or 0
                if delta.error is None:
                    yield delta
                    continue
                if delta.token_ids:
                    yield replace(delta, finish_reason=None, error=None)
                raise delta.error
        finally:
            if timer is not None:
                timer.cancel()
            if not has_ended:
                self._requests.abort(sequence)
