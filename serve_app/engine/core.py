"""EngineCore: the loop of the engine's thread.

Each iteration takes new requests, schedules a step, launches it, collects the sampled tokens and
delivers them.

On a CPU a step contains both the decodes and the prefill chunks, and its tokens are delivered
before the next step begins.

On a device that can overlap steps, the next step is launched before the tokens of the last one are
read (async scheduling): the device computes while the host collects, delivers and schedules. A
`PENDING` placeholder in a sequence stands for the token that is not known yet. There, decodes and
prefill chunks alternate as separate steps, because decodes replay a captured graph. Decoded tokens
are delivered before the next prefill chunks are launched, because that launch may take the host
longer than the kernels run: with 512 tokens on an H200, 4 layers took 30 ms, of which kernels took
12 ms. Example, in which A and B are streams and C is a prompt of two chunks:

    launch A B | collect A B, deliver, launch C1 | launch A B, collect C1 | collect A B, deliver,
    launch C2 | launch A B C (the token of C is pending), collect C2, deliver | ...
"""

import contextlib
import copy
import logging
from typing import NamedTuple

from serve_app.engine.block_manager import BlockManager
from serve_app.engine.delta import Delta, FinishReason, TokenLogprob
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.output_queue import OutputQueue
from serve_app.engine.prefill_policy import Policy, PrefillPolicy
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.runner import InFlightStep, Runner
from serve_app.engine.scheduled_tokens import ScheduledTokens, mark_launched
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import FAILED, Sequence
from serve_app.engine.step_cost import StepShape, shape_of
from serve_app.engine.stream import Stream
from serve_app.engine.watchdog import Watchdog
from serve_app.errors import InternalError, InvalidRequest, ServeError, as_serve_error

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""The engine ends after this many failed steps in a row, because the device seems to be broken."""


class _Launched(NamedTuple):
    """An in-flight step."""

    scheduled: list[ScheduledTokens]
    step: InFlightStep
    shape: StepShape
    predicted_s: float


class EngineCore:
    """Computes the sequences of `requests` on `runner`. Other threads only read its counters."""

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        requests: RequestQueue,
        policy: Policy | None = None,
        outputs: OutputQueue | None = None,
    ) -> None:
        self.blocks = BlockManager(config.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.enable_prefix_caching,
        )
        self.watchdog = Watchdog(config.step_timeout_s)
        self.num_generation_tokens = 0
        self.num_prompt_tokens = 0
        self.num_steps = 0
        self.step_seconds = 0.0
        self._runner = runner
        self._requests = requests
        self._policy = policy or PrefillPolicy(
            config.max_num_batched_tokens,
            config.max_stall_s,
            config.prefill_share,
            runner.few_prompt_tokens,
        )
        self._outputs = outputs or OutputQueue()
        # All live sequences.
        self._streams: dict[Sequence, Stream] = {}
        self._in_flight: _Launched | None = None
        # Whether the last step has only decodes; always false if steps do not overlap.
        self._has_decoded = False
        self._num_failed_steps = 0

    def run(self) -> None:
        """Runs until `requests` is stopped or the device fails, then ends all live sequences."""
        try:
            while self._take_requests(wait=not self.scheduler.has_work and not self._in_flight):
                with self.watchdog:
                    self._step()
                    self._deliver()
                if self._num_failed_steps >= MAX_FAILED_STEPS:
                    log.critical("The engine ends: %d steps in a row failed.", MAX_FAILED_STEPS)
                    self._requests.fail()
                if self._requests.has_failed:
                    break
        except BaseException:
            log.critical("The engine ends: its loop failed.", exc_info=True)
            self._requests.fail()
        finally:
            self._end_all()

    def _take_requests(self, *, wait: bool) -> bool:
        """Adds new sequences and drops aborted ones. Returns False when the engine must stop."""
        requests = self._requests.take(wait=wait)
        for sequence, stream in requests.accepted:
            self._streams[sequence] = stream
            self.scheduler.add(sequence)
            self.num_prompt_tokens += sequence.num_prompt_tokens
        for sequence in requests.aborted:
            # The last step may have ended it.
            if sequence in self._streams:
                self._drop(sequence)
        return not requests.is_stopping

    def _step(self) -> None:
        """Launches the next step, then collects the tokens of the previous one."""
        if any(sequence.needs_last_token for sequence in self.scheduler.running):
            # The last token may still be in flight.
            self._collect()
        had_decoded = self._has_decoded
        scheduled = self._schedule()
        if had_decoded and scheduled and not self._has_decoded:
            # These are prefill chunks, whose launch may take long: first deliver the decodes.
            self._collect()
            self._deliver(is_pausing=True)
            # `_deliver` has dropped the sequences of closed event loops.
            scheduled = [part for part in scheduled if part.sequence in self._streams]
        launched = self._launch(scheduled)
        self._collect()
        self._in_flight = launched
        if not self._runner.can_overlap_steps:
            self._collect()

    def _schedule(self) -> list[ScheduledTokens]:
        """Returns the next step. If steps overlap, decodes and prefill chunks alternate."""
        if not self._runner.can_overlap_steps:
            return self.scheduler.schedule(self._policy)
        if self._has_decoded and (chunks := self.scheduler.schedule_prompts(self._policy)):
            self._has_decoded = False
            return chunks
        decodes = self.scheduler.schedule_decodes()
        self._has_decoded = bool(decodes)
        return decodes or self.scheduler.schedule_prompts(self._policy)

    def _launch(self, scheduled: list[ScheduledTokens]) -> "_Launched | None":
        """Launches a step. Returns None if it is empty or the launch fails."""
        if not scheduled:
            return None
        self.num_steps += 1
        if self.scheduler.unchecked_blocks:
            self._runner.clear_blocks(self.scheduler.unchecked_blocks)
            self.scheduler.unchecked_blocks = []
        try:
            step = self._runner.launch(scheduled)
        except Exception as error:
            self._fail_step(scheduled, error)
            return None
        shape = shape_of(scheduled)
        mark_launched(scheduled)
        return _Launched(scheduled, step, shape, self._policy.launched(shape))

    def _collect(self) -> None:
        """Waits for the in-flight step, if any, and adds its tokens to the output queue."""
        if self._in_flight is None:
            return
        (scheduled, step, shape, predicted_s), self._in_flight = self._in_flight, None
        try:
            token_ids, logprobs, seconds, scores = step.wait()
        except Exception as error:
            self._fail_step(scheduled, error)
            return
        self._num_failed_steps = 0
        if seconds:
            self.step_seconds += seconds
            self._policy.finished(shape, predicted_s, seconds)
        for sequence, prompt_logprobs in scores:
            if sequence in self._streams:
                scored = Delta([], [], prompt_logprobs=[prompt_logprobs])
                self._outputs.add(self._streams[sequence], scored)
        sampled = [part for part in scheduled if part.is_sampled]
        for row, (part, token_id) in enumerate(zip(sampled, token_ids, strict=True)):
            # If a sequence ended while the step ran, its token is dropped.
            if part.sequence in self._streams:
                self._receive(part.sequence, part.end, token_id, logprobs.get(row))

    def _receive(
        self, sequence: Sequence, position: int, token_id: int, logprob: TokenLogprob | None
    ) -> None:
        """Appends one sampled token to its sequence and its stream, and ends a complete sequence.

        `position` is the token's index in `token_ids`.
        """
        if token_id == FAILED:
            self._end(sequence, Delta([], [], "error", self._failure(sequence)))
            return
        # The logits are finite, so the keys and values before them are finite too.
        sequence.num_finite_tokens = position
        self.scheduler.cache_blocks(sequence, position)
        if not sequence.params.max_tokens:
            self._end(sequence, Delta([], [], "length"))
            return
        if token_id in sequence.stop_ids:
            # A client that scores a prompt with its answer expects one score per sampled token.
            is_scored = sequence.params.prompt_logprobs is not None
            scores = [logprob] if is_scored and logprob is not None else []
            self._end(sequence, Delta([], scores, "stop"))
            return
        sequence.token_ids[position] = token_id
        self.num_generation_tokens += 1
        reason: FinishReason | None = None
        if sequence.constraint is not None:
            sequence.constraint.accept(token_id)
            reason = "stop" if sequence.constraint.is_complete else None
        if reason is None and position + 1 >= sequence.max_num_tokens:
            reason = "length"
        delta = Delta([token_id], [] if logprob is None else [logprob], reason)
        if reason is not None:
            self._end(sequence, delta)
        else:
            self._outputs.add(self._streams[sequence], delta)

    def _failure(self, sequence: Sequence) -> ServeError:
        """Returns the error of a sequence whose sampled token is `FAILED`."""
        if sequence.constraint is not None and sequence.constraint.has_failed:
            return InvalidRequest(
                "The grammar became too complex for this server; send a simpler one."
            )
        log.error("The logits of a sequence were not finite; its request fails.")
        self._runner.clear_blocks(sequence.block_table[sequence.num_cached_blocks :])
        return InternalError("The model's logits were not finite; send the request again.")

    def _fail_step(self, scheduled: list[ScheduledTokens], error: Exception) -> None:
        """Ends each sequence of a failed step with the error."""
        log.error("A step with %d sequences failed.", len(scheduled), exc_info=error)
        self._num_failed_steps += 1
        for part in scheduled:
            if part.sequence in self._streams:
                sequence = part.sequence
                # The step may have written some of its keys and values, finite or not.
                sequence.num_computed_tokens = max(sequence.num_computed_tokens, part.end)
                # One copy per sequence, because raising an exception writes a traceback into it.
                own_error = copy.copy(as_serve_error(error))
                self._end(part.sequence, Delta([], [], "error", own_error))

    def _end(self, sequence: Sequence, last: Delta) -> None:
        """Ends a sequence with its last delta."""
        self._outputs.add(self._streams[sequence], last)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Removes a sequence and frees its KV blocks, without sending a delta."""
        self.scheduler.remove(sequence)
        del self._streams[sequence]
        self._requests.finish_one(sequence)

    def _deliver(self, *, is_pausing: bool = False) -> None:
        """Sends new deltas, and drops the sequences of closed event loops.

        `is_pausing` also sends the deltas that would otherwise wait; see `OutputQueue.flush`.
        """
        if closed := self._outputs.flush(is_pausing=is_pausing):
            for sequence, stream in list(self._streams.items()):
                if stream.loop in closed:
                    self._drop(sequence)

    def abandon(self) -> None:
        """Ends the streams of all sequences with `EngineDead`. Another thread calls this.

        The engine's thread hangs in a step and cannot end them. The sequences keep their blocks.
        """
        self._requests.fail()
        waiting = self._requests.take(wait=False).accepted
        for stream in (*self._streams.values(), *(stream for _, stream in waiting)):
            last = Delta([], [], "error", self._requests.refusal())
            # The consumer's event loop may be closed.
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.put, last)

    def _end_all(self) -> None:
        self._take_requests(wait=False)
        for stream in self._streams.values():
            self._outputs.add(stream, Delta([], [], "error", self._requests.refusal()))
        try:
            for sequence in list(self._streams):
                self._drop(sequence)
        finally:
            # The consumers must get their errors even if the scheduler has failed.
            self._outputs.flush()
