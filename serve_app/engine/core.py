"""EngineCore: the loop of the engine's thread.

Each iteration takes new requests, schedules a step, launches it, collects the sampled tokens and
delivers them.

On a CPU a step contains both the decodes and the prefill chunks, and its tokens are delivered
before the next step begins.

On a device that can overlap steps, the next step is launched before the tokens of the last step are
read (async scheduling): the device computes while the host collects, delivers and schedules. A
`PENDING` placeholder in a sequence stands for a token that the host does not know yet. On such a
device, decodes and prefill chunks alternate as separate steps, because decodes replay a captured
graph. Decoded tokens are delivered before the next prefill chunks are launched, because the launch
may take the host longer than the kernels run: with 512 tokens and 4 layers on an H200 the launch
took 30 ms and the kernels 12 ms. Example, in which A and B are streams and C is a prompt of two
chunks:

    launch A B | collect A B, deliver, launch C1 | launch A B, collect C1 | collect A B, deliver,
    launch C2 | launch A B C (the token of C is pending), collect C2, deliver | ...
"""

import logging
from typing import NamedTuple

from serve_app.engine.block_manager import BlockManager
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.live_sequences import LiveSequences
from serve_app.engine.output_queue import OutputQueue
from serve_app.engine.prefill_policy import Policy, PrefillPolicy
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.runner import InFlightStep, Runner
from serve_app.engine.scheduled_tokens import ScheduledTokens, mark_launched
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.step_cost import StepShape, shape_of
from serve_app.engine.watchdog import Watchdog

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
        outputs = outputs or OutputQueue()
        self.live = LiveSequences(self.scheduler, requests, outputs, runner.clear_blocks)
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
                    self.live.deliver()
                if self._num_failed_steps >= MAX_FAILED_STEPS:
                    log.critical("The engine ends: %d steps in a row failed.", MAX_FAILED_STEPS)
                    self._requests.fail()
                if self._requests.has_failed:
                    break
        except BaseException:
            log.critical("The engine ends: its loop failed.", exc_info=True)
            self._requests.fail()
        finally:
            self.live.end_all()

    def _take_requests(self, *, wait: bool) -> bool:
        """Adds new sequences and drops aborted ones. Returns False when the engine must stop."""
        requests = self._requests.take(wait=wait)
        self.live.add(requests.accepted)
        self.num_prompt_tokens += sum(
            sequence.num_prompt_tokens for sequence, _ in requests.accepted
        )
        for sequence in requests.aborted:
            # The last step may have ended the sequence.
            if sequence in self.live:
                self.live.drop(sequence)
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
            self.live.deliver(is_pausing=True)
            # `deliver` has dropped the sequences of closed event loops.
            scheduled = [part for part in scheduled if part.sequence in self.live]
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
            self.live.receive_scores(sequence, prompt_logprobs)
        sampled = [part for part in scheduled if part.is_sampled]
        for row, (part, token_id) in enumerate(zip(sampled, token_ids, strict=True)):
            # If a sequence ended while the step ran, its token is dropped.
            if part.sequence in self.live:
                self.live.receive(part.sequence, part.end, token_id, logprobs.get(row))

    def _fail_step(self, scheduled: list[ScheduledTokens], error: Exception) -> None:
        """Counts a failed step, and ends its sequences."""
        self._num_failed_steps += 1
        self.live.fail(scheduled, error)
