"""Engine: token ids in, deltas out. The asyncio face of a loop in a thread of its own.

Every accepted request ends exactly once: with `stop`, `length`, its consumer's leaving, or its own
error. A failed step costs the sequences in it and nobody else; three in a row end the engine. The
loop sleeps when there is nothing to do, and never waits for a consumer.

Knows neither text nor HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from threading import Thread

from serve_app.engine.admission import EngineConfig, admit
from serve_app.engine.inbox import Inbox
from serve_app.engine.loop import Loop
from serve_app.engine.outbox import Stream
from serve_app.engine.runner import Runner
from serve_app.engine.sequence import Delta, SamplingParams

__all__ = ["Engine", "EngineConfig", "EngineStats"]


@dataclass(frozen=True)
class EngineStats:
    """Now: sequences and KV blocks. Since the start: the counters."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    generated_tokens: int
    prompt_tokens: int
    queried_tokens: int
    """Of prompts, and of what a preemption put back: looked for in the cache."""
    shared_tokens: int
    """Of those: found there, and not computed."""
    preemptions: int
    steps: int


class Engine:
    """Continuous batching over one runner."""

    def __init__(self, runner: Runner, config: EngineConfig) -> None:
        self.config = config
        self._vocab_size = runner.vocab_size
        self._inbox = Inbox(config.max_num_seqs + config.max_waiting, config.retry_after_s)
        self._loop = Loop(runner, config, self._inbox)
        self._thread = Thread(target=self._loop.run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the loop's thread; once."""
        self._thread.start()

    def stop(self) -> None:
        """Ends everyone with `Draining` after the step that runs, and waits for the thread."""
        self._inbox.stop()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the loop runs and takes requests."""
        return self._thread.is_alive() and not self._inbox.is_dead

    def stats(self) -> EngineStats:
        """Numbers for metrics; from any thread."""
        loop = self._loop
        return EngineStats(
            running=len(loop.scheduler.running),
            waiting=len(loop.scheduler.waiting) + self._inbox.num_unread,
            kv_blocks_used=loop.blocks.num_used,
            kv_blocks_total=loop.blocks.num_blocks,
            generated_tokens=loop.generated_tokens,
            prompt_tokens=loop.prompt_tokens,
            queried_tokens=loop.scheduler.num_queried_tokens,
            shared_tokens=loop.scheduler.num_shared_tokens,
            preemptions=loop.scheduler.num_preemptions,
            steps=loop.steps,
        )

    async def generate(
        self, prompt_ids: list[int], params: SamplingParams, deadline: float | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of a new request, each with all that came since the last; the last one ends it.

        The first iteration raises `InvalidRequest` or `ContextLengthExceeded` for what can never
        run, `QueueFull`, `Draining` or `EngineDead` for what cannot now. Later ones raise the
        request's own failure, or `DeadlinePassed` at `deadline`, a time on the event loop's clock.
        Closing the generator, or cancelling its task, frees the request's blocks before the next
        step.
        """
        sequence = admit(prompt_ids, params, self.config, self._vocab_size)
        stream = Stream(asyncio.get_running_loop())
        self._inbox.submit(sequence, stream)
        # One timer for the request, not one for each wait.
        timer = None if deadline is None else stream.loop.call_at(deadline, stream.expire)
        has_ended = False
        try:
            while not has_ended:
                delta = await stream.next()
                # The engine does not know of a deadline that has passed.
                has_ended = delta.finish_reason not in (None, "cancelled")
                delta.queued_s = sequence.queued_s
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
                self._inbox.abort(sequence)
