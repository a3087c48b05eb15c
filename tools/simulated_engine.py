"""SimulatedEngine: the engine's core on a simulated device, which has a clock and computes nothing.

`EngineCore` with its loop, async scheduling, scheduler, block manager and prefill policy is the
real one. Time passes only on the device, and while the engine has no work.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from serve_app.engine.core import EngineCore
from serve_app.engine.delta import Delta
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.output_queue import OutputQueue
from serve_app.engine.prefill_policy import Policy
from serve_app.engine.request_queue import RequestQueue, Requests
from serve_app.engine.runner import SampledTokens
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import Sequence
from serve_app.engine.step_cost import StepShape, shape_of

HOST_S = 0.0002
"""Seconds of the host between two steps."""
SAMPLED = 7
"""The token that every step samples."""


class Clock:
    """The simulated time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Arrival:
    """One request of a load, and its results. Times in seconds."""

    at: float
    num_new_tokens: int
    """Number of prompt tokens, without those of the previous turns."""
    num_output_tokens: int
    then: "Arrival | None" = None
    """The next turn of a conversation; it arrives `at` seconds after this answer's end."""
    group: str = ""
    """The group of its `SchedulingClass`."""
    history: list[int] = field(default_factory=list)
    """The tokens of the previous turns."""
    token_times: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        return self.token_times[0] - self.at

    @property
    def answer_s(self) -> float:
        return self.token_times[-1] - self.at

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between two tokens."""
        return [after - before for before, after in pairwise(self.token_times)]


class _Stream:
    """Records when the tokens of one request are delivered."""

    def __init__(self, arrival: Arrival, engine: "SimulatedEngine") -> None:
        self.loop = engine.loop
        self.has_begun = False
        self._arrival, self._engine = arrival, engine

    def put(self, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        now = self._engine.clock()
        self._arrival.token_times += [now] * len(delta.token_ids)
        if delta.finish_reason is not None:
            self._engine.finish(self._arrival)


class ImmediateLoop:
    """An event loop that runs a callback at once."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: Any) -> None:
        callback(*arguments)

    call_soon = call_soon_threadsafe

    def is_closed(self) -> bool:
        return False


class _Step:
    """A step on the simulated device, which ends at a known time."""

    def __init__(self, clock: Clock, num_sampled: int, end: float, seconds: float) -> None:
        self._clock, self._num_sampled = clock, num_sampled
        self._end, self._seconds = end, seconds

    def wait(self) -> SampledTokens:
        self._clock.now = max(self._clock.now, self._end)
        return SampledTokens([SAMPLED] * self._num_sampled, {}, self._seconds)


class _Device:
    """A runner whose steps take `step_s(shape)` seconds, one after the other.

    A launch that blocks returns at the end of its step, as when a GPU's queue is full.
    """

    vocab_size = 32_000

    def __init__(
        self,
        clock: Clock,
        step_s: Callable[[StepShape], float],
        *,
        can_overlap_steps: bool,
        launch_blocks: bool,
    ) -> None:
        self.can_overlap_steps = can_overlap_steps
        self.few_prompt_tokens = 0
        self.steps: list[StepShape] = []
        self.ends: list[float] = []
        """The end times of the steps."""
        self._clock, self._step_s = clock, step_s
        self._launch_blocks = launch_blocks
        self._free_at = 0.0

    def launch(self, scheduled: list[ScheduledTokens]) -> _Step:
        self._clock.now += HOST_S
        shape = shape_of(scheduled)
        seconds = self._step_s(shape)
        self.steps.append(shape)
        self._free_at = max(self._free_at, self._clock.now) + seconds
        self.ends.append(self._free_at)
        if self._launch_blocks:
            self._clock.now = self._free_at
        num_sampled = sum(part.is_sampled for part in scheduled)
        return _Step(self._clock, num_sampled, self._free_at, seconds)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Does nothing, because there is no KV cache."""


class _Arrivals(RequestQueue):
    """A request queue that is filled by the simulated time."""

    def __init__(self, engine: "SimulatedEngine") -> None:
        super().__init__(max_running=1 << 30, max_waiting=0, retry_after_s=1)
        self._engine = engine

    def take(self, *, wait: bool) -> Requests:
        return self._engine.take(wait=wait)


class SimulatedEngine:
    """Runs one load with one policy."""

    def __init__(
        self,
        config: EngineConfig,
        step_s: Callable[[StepShape], float],
        policy: Policy | None,
        *,
        can_overlap_steps: bool,
        launch_blocks: bool = False,
    ) -> None:
        self.clock = Clock()
        self.loop = ImmediateLoop()
        self.num_turns = 0
        """Number of iterations of the core's loop."""
        self.device = _Device(
            self.clock,
            step_s,
            can_overlap_steps=can_overlap_steps,
            launch_blocks=launch_blocks or not can_overlap_steps,
        )
        outputs = OutputQueue(self.clock)
        self.core = EngineCore(self.device, config, _Arrivals(self), policy, outputs)
        self._pending: list[Arrival] = []
        self._ended: list[Arrival] = []
        self._num_accepted = 0
        self._num_alive = 0

    def run(self, arrivals: Iterable[Arrival]) -> list[Arrival]:
        """Runs until every request has ended. Returns the requests and all their later turns."""
        self._pending = sorted(arrivals, key=lambda arrival: arrival.at)
        self._ended = []
        self.core.run()
        return self._ended

    def take(self, *, wait: bool) -> Requests:
        """Returns the requests that have arrived; with `wait`, time passes until one arrives."""
        self.num_turns += 1
        if wait and self._pending:
            self.clock.now = max(self.clock.now, self._pending[0].at)
        accepted = []
        while self._pending and self._pending[0].at <= self.clock.now:
            arrival = self._pending.pop(0)
            params = SamplingParams(arrival.num_output_tokens, ignore_eos=True)
            self._num_accepted += 1
            # No two prompts begin alike, but the turns of one conversation do.
            arrival.history += [SAMPLED + self._num_accepted] * arrival.num_new_tokens
            sequence = Sequence(list(arrival.history), params, 0, frozenset())
            sequence.scheduling_class = SchedulingClass(arrival.group)
            accepted.append((sequence, _Stream(arrival, self)))
            self._num_alive += 1
        is_over = not accepted and not self._pending and not self._num_alive
        return Requests(accepted, [], is_over)  # type: ignore[arg-type]

    def finish(self, arrival: Arrival) -> None:
        """Counts an ended request; its next turn arrives later."""
        self._num_alive -= 1
        self._ended.append(arrival)
        if arrival.then is not None:
            arrival.then.at += self.clock()
            arrival.then.history = [*arrival.history, *[SAMPLED] * arrival.num_output_tokens]
            self._pending.append(arrival.then)
            self._pending.sort(key=lambda pending: pending.at)
