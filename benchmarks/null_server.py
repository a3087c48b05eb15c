"""The deployment around a null model: it computes nothing, and each of its steps takes 5 ms.

`benchmarks.overhead` has `serve run` start `build_app`. Tokenizer, engine, detokenizing, schemas
and endpoints are the real ones. `NullRunner` stands in for the model and the sampler; every answer
is the same text, repeated.
"""

import ctypes
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from serve_app.app import application
from serve_app.config.settings import Settings
from serve_app.engine.engine import Engine
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.runner import SampledTokens
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Phase
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.tiny import CHECKPOINT

if TYPE_CHECKING:
    from ray.serve import Application

STEP_S = 0.005
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 768
BLOCK_SIZE = 16
TEXT = (
    "The capital of France is Paris, and 2 + 3 = 5. Grass is green; the sky is blue. "
    "A café serves crème brûlée, naïve as it is. This server speaks to 32 clients at once.\n"
)
PR_SET_TIMERSLACK = 29


class NullRunner:
    """A runner whose steps take `step_s` seconds of a simulated device, one after the other.

    As on a GPU, the next step can be queued while the host reads the last one's tokens, and the
    device idles when the host is late. Waiting releases Python's lock. Linux wakes a sleeping
    thread late; the median delay is measured before there is load, and subtracted. Time that a step
    waits for Python's lock or for a processor is not subtracted.
    """

    vocab_size = VOCAB_SIZE
    can_overlap_steps = True
    few_prompt_tokens = 0

    def __init__(self, token_ids: list[int], step_s: float = STEP_S) -> None:
        self._token_ids = token_ids
        self._step_s = step_s
        self._late_s = _late_s(step_s)
        self._free_at = 0.0
        """The time at which the device finishes its queued steps."""
        self.thread_s = 0.0
        """Processor time of the engine's thread up to the last launch."""

    def launch(self, scheduled: list[ScheduledTokens]) -> "NullStep":
        if self.thread_s == 0.0:
            _wake_promptly()
        self.thread_s = time.thread_time()
        self._free_at = max(self._free_at, time.perf_counter()) + self._step_s
        ids = self._token_ids
        sampled = [part.sequence for part in scheduled if part.is_sampled]
        tokens = [ids[sequence.num_output_tokens % len(ids)] for sequence in sampled]
        return NullStep(tokens, self._free_at - self._late_s)

    def clear_blocks(self, blocks: list[int]) -> None:
        """Does nothing, because there is no KV cache."""


class NullStep(NamedTuple):
    """A step in flight on the simulated device."""

    token_ids: list[int]
    ends_at: float

    def wait(self) -> SampledTokens:
        time.sleep(max(0.0, self.ends_at - time.perf_counter()))
        return SampledTokens(self.token_ids, {})


def _wake_promptly() -> None:
    """Asks Linux to wake this thread on time; by default it may be 50 us late."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def _late_s(step_s: float) -> float:
    """Returns the median seconds by which a sleep of `step_s` is too long on this machine."""
    _wake_promptly()
    late = []
    for _ in range(40):
        began = time.perf_counter()
        time.sleep(step_s)
        late.append(time.perf_counter() - began - step_s)
    return statistics.median(late)


def load(settings: Settings, load_log: LoadLog) -> Loaded:
    """Replaces `serve_app.loading.load.load`: the tiny model's tokenizer, and no model."""
    with load_log.phase(Phase.TOKENIZER):
        tokenizer = Tokenizer(CHECKPOINT)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    engine = engine_of(NullRunner(ids), settings.engine.max_num_seqs)
    engine.start()
    load_log.ready()
    memory = dict.fromkeys(("experts", "attention", "head", "other", "kv_cache"), 0)
    notes = [f"no model: every step takes {STEP_S * 1e3:g} ms"]
    return Loaded(tokenizer, engine, MAX_MODEL_LEN, VOCAB_SIZE, "none", None, memory, notes)


def engine_of(runner: NullRunner, max_num_seqs: int) -> Engine:
    """Returns an engine around `runner`, not started."""
    return Engine(
        runner,
        EngineConfig(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_waiting=max_num_seqs,
            block_size=BLOCK_SIZE,
            num_blocks=max_num_seqs * MAX_MODEL_LEN // BLOCK_SIZE,
            max_num_batched_tokens=512,
            eos_token_ids=frozenset(),
        ),
    )


def build_app(settings: Settings) -> "Application":
    """Returns the Serve application, as `serve_app.app.build_app` makes it."""
    return application(settings, load)
