"""If steps overlap, decodes and prefill chunks are separate steps, which alternate."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.core import EngineCore
from serve_app.engine.decode_graphs import DecodeGraphs
from serve_app.engine.delta import Delta
from serve_app.engine.in_flight_tokens import InFlightTokens
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.request_queue import RequestQueue, Requests
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import Sequence
from tests.engine.fake import config
from tests.engine.late_device import LateDevice, answer_of
from tests.engine.mixtral import Pair, serving, together
from tests.engine.test_async_scheduling import requests
from tests.engine.test_decode_graphs import WithGraphs
from tests.engine.test_prefill_policy import H200, after, engine_of
from tools.simulated_engine import HOST_S, Arrival, ImmediateLoop


@pytest.mark.parametrize("launch_blocks", [False, True])
def test_decoded_tokens_go_out_before_the_prompt_is_computed(launch_blocks: bool) -> None:
    """Tokens decoded before a prefill chunk are delivered when their own step ends, not when that
    of the chunk does, whether launches block the host or not."""
    engine = engine_of(H200, launch_blocks=launch_blocks)
    ended = after(engine, Arrival(0, 20, 200), Arrival(0.5, 16_000, 2))
    stream = next(arrival for arrival in ended if arrival.num_new_tokens == 20)
    steps = list(zip(engine.device.steps, engine.device.ends, strict=True))
    decodes = [i for i, (shape, _) in enumerate(steps) if shape.num_decodes]
    before_chunks = [i for i in decodes[:-1] if steps[i + 1][0].num_prompt_tokens]
    assert len(before_chunks) >= 4
    # The first token comes from the prompt; then each step of decodes gives one.
    delivered = dict(zip(decodes, stream.token_times[1:], strict=False))
    for i in before_chunks:
        assert steps[i][1] <= delivered[i] <= steps[i][1] + 3 * HOST_S
    assert all(steps[i + 2][0].num_decodes for i in before_chunks), "no chunk follows a chunk"


def test_decodes_beside_prompts_replay_their_graph(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real steps, each decode runs in a captured step, and the tokens are those of an engine
    that computes decodes and prefill chunks together."""
    asked = requests(penalized=True)
    launched: list[list[ScheduledTokens]] = []
    launch = ModelRunner.launch

    def spy(self: ModelRunner, scheduled: list[ScheduledTokens]) -> InFlightTokens:
        launched.append(scheduled)
        return launch(self, scheduled)

    replayed: list[int] = []
    replay: Callable[..., Any] = DecodeGraphs.run

    def counted(self: DecodeGraphs, decodes: list[ScheduledTokens], *others: Any) -> Any:
        replayed.append(len(decodes))
        return replay(self, decodes, *others)

    monkeypatch.setattr(ModelRunner, "launch", spy)
    monkeypatch.setattr(DecodeGraphs, "run", counted)
    with serving(pair.ours) as engine:
        expected = [answer[:2] for answer in together(engine, asked)]
    assert any(len({part.is_decode for part in step}) == 2 for step in launched)
    launched.clear()
    with serving(pair.ours, can_overlap_steps=True, prepare=WithGraphs()) as engine:
        assert [answer[:2] for answer in together(engine, asked)] == expected
    assert all(len({part.is_decode for part in step}) == 1 for step in launched)
    assert replayed == [len(step) for step in launched if step[0].is_decode]


class _Stream:
    """Records an answer."""

    def __init__(self, loop: ImmediateLoop) -> None:
        self.loop, self.has_begun = loop, False
        self.token_ids: list[int] = []
        self.reasons: list[str] = []

    def put(self, delta: Delta) -> None:
        self.token_ids += delta.token_ids
        self.reasons += [delta.finish_reason] if delta.finish_reason else []


class _Script(RequestQueue):
    """Gives the core one event per turn: a new sequence, or the number of one that leaves."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__(max_running=1000, max_waiting=0, retry_after_s=1)
        self.streams: dict[Sequence, _Stream] = {}
        self.left: set[Sequence] = set()
        self._events, self._loop = events[::-1], ImmediateLoop()

    def take(self, *, wait: bool) -> Requests:
        accepted: list[Any] = []
        aborted: list[Sequence] = []
        match self._events.pop() if self._events else None:
            case Sequence() as sequence:
                self.streams[sequence] = _Stream(self._loop)
                accepted.append((sequence, self.streams[sequence]))
            case int(number) if number < len(self.streams):
                aborted.append(list(self.streams)[number])
                self.left.update(aborted)
        return Requests(accepted, aborted, wait and not self._events and not accepted)


def new_sequence(
    num_prompt: int, max_tokens: int, kind: int, is_penalized: bool, group: str
) -> Sequence:
    """Prompts of one kind begin alike; those of kind 2 have tokens that end the answer."""
    params = SamplingParams(max_tokens, presence_penalty=0.1 if is_penalized else 0.0)
    stop_ids = frozenset(range(0, 20, 4)) if kind == 2 else frozenset()
    sequence = Sequence([kind] * num_prompt, params, 0, stop_ids)
    sequence.scheduling_class = SchedulingClass(group)
    return sequence


NEW = st.builds(
    new_sequence,
    num_prompt=st.integers(1, 20),
    max_tokens=st.integers(1, 12),
    kind=st.integers(0, 2),
    is_penalized=st.sampled_from([False] * 9 + [True]),
    group=st.sampled_from("ab"),
)


@settings(max_examples=300)
@given(
    events=st.lists(st.one_of(NEW, NEW, st.integers(0, 20), st.none()), max_size=50),
    block_size=st.integers(1, 5),
    more_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 6),
    more_tokens=st.integers(0, 10),
    data=st.data(),
)
def test_a_block_is_used_again_only_after_every_step_that_writes_it(
    events: list[Any],
    block_size: int,
    more_blocks: int,
    max_num_seqs: int,
    more_tokens: int,
    data: st.DataObject,
) -> None:
    """For any order of the device's steps, aborts, stops and preemptions, each answer is that of
    its prompt alone, and every block is free at the end."""
    device = LateDevice(lambda: data.draw(st.booleans()))
    script = _Script(events)
    limits = config(
        block_size=block_size,
        num_blocks=-(-31 // block_size) + more_blocks,  # 31 tokens: the longest request alone
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + more_tokens,
    )
    core = EngineCore(device, limits, script)
    device.blocks = core.blocks
    core.run()
    assert not script.has_failed
    for sequence, stream in script.streams.items():
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        expected = answer_of(prompt, sequence.params.max_tokens, sequence.stop_ids)
        if sequence in script.left:
            assert stream.token_ids == expected[: len(stream.token_ids)]
        else:
            reason = "length" if len(expected) == sequence.params.max_tokens else "stop"
            assert (stream.token_ids, stream.reasons) == (expected, [reason])
    assert core.blocks.num_used == 0
