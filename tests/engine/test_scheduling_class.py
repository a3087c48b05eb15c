"""Groups of requests share the engine, and priorities come first."""

import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.step_times import DEVICES
from serve_app.engine.block_manager import BlockManager
from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.prefill_policy import PrefillPolicy
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import Sequence
from serve_app.errors import QueueFull
from tests.engine.scheduler_driver import Driver
from tools.simulated_engine import Arrival, SimulatedEngine


def driver(max_num_seqs: int = 1) -> Driver:
    return Driver(Scheduler(BlockManager(200, 4), max_num_seqs, 64))


def add(driver: Driver, scheduling_class: SchedulingClass, num_prompt: int = 8) -> Sequence:
    return driver.add_of(scheduling_class, num_prompt, 3)


def order(driver: Driver) -> list[Sequence]:
    """Runs all; the sequences in the order in which they began."""
    while driver.scheduler.has_work:
        driver.step()
    return driver.admitted


def test_a_new_group_overtakes_the_waiting_requests_of_a_busy_group() -> None:
    """Requests of two keys start before most of the ten earlier requests of another key."""
    found = driver()
    greedy = [add(found, SchedulingClass("greedy")) for _ in range(10)]
    found.step()
    polite = [add(found, SchedulingClass(name)) for name in ("ann", "bob")]
    begun = order(found)
    assert begun[0] is greedy[0]
    assert set(polite) <= set(begun[1:4])


@given(
    sizes=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=3, max_size=40),
)
def test_groups_that_wait_get_equal_shares(sizes: list[tuple[str, int]]) -> None:
    """While all three groups wait, none is ahead of another by more prompt tokens than two of the
    largest prompts have."""
    found = driver()
    waiting = Counter(group for group, _ in sizes)
    for group, size in sizes:
        add(found, SchedulingClass(group), size)
    served: Counter[str] = Counter()
    largest = 2 * max(size for _, size in sizes)
    for sequence in order(found):
        if all(waiting[group] for group in "abc"):
            assert max(served[g] for g in "abc") - min(served[g] for g in "abc") <= largest
        group = sequence.scheduling_class.group
        waiting[group] -= 1
        served[group] += sequence.num_prompt_tokens


def test_a_smaller_priority_comes_first() -> None:
    """A smaller priority precedes any group and arrival, as in vLLM; equal priorities keep the
    order of arrival."""
    found = driver()
    add(found, SchedulingClass("a"))
    found.step()
    classes = [("a", 5), ("b", 1), ("a", 0), ("a", -3), ("b", 1)]
    later = [add(found, SchedulingClass(*each)) for each in classes]
    assert order(found)[1:] == [later[index] for index in (3, 2, 1, 4, 0)]


@given(
    num_places=st.integers(3, 60),
    wanted=st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=200),
)
def test_a_group_never_takes_all_places(num_places: int, wanted: list[str]) -> None:
    """One group gets two thirds of the places at most; requests without a group may fill them."""
    queue = RequestQueue(1, num_places - 1, 1)
    taken: Counter[str] = Counter()
    for group in wanted:
        try:
            queue.take_place(group)
        except QueueFull:
            assert group or queue.num_taken == num_places
        else:
            taken[group] += 1
    assert all(taken[group] <= 2 / 3 * num_places + 1 for group in "abc")
    for group, number in taken.items():
        for _ in range(number):
            queue.free_place(group)
    assert queue.num_taken == 0


def test_a_group_replaces_running_sequences_of_a_larger_one() -> None:
    """A request beside a key with all places runs in the next step, in place of that key's latest
    one, which goes on where it was before the key's waiting requests begin."""
    found = driver(max_num_seqs=3)
    greedy = [found.add_of(SchedulingClass("greedy"), 8, 40, kind) for kind in range(5)]
    for _ in range(20):
        found.step()
    assert found.scheduler.running == greedy[:3]
    polite = found.add_of(SchedulingClass("polite"), 8, 5)
    assert polite in [part.sequence for part in found.step()]
    assert found.scheduler.running == [*greedy[:2], polite]
    replaced, done = greedy[2], greedy[2].num_output_tokens
    while not found.ended[polite]:
        found.step()
    (chunk,) = [part for part in found.step() if part.sequence is replaced]
    assert (replaced.num_output_tokens - 1, chunk.num_tokens) == (done, (8 + done) % 4 or 4)
    while found.step():
        pass
    assert all(found.ended[sequence] for sequence in found.arrived)


def polite(number: int) -> Arrival:
    """Returns one of ten clients, each with a key of its own and four requests in a row."""
    later = None
    for _ in range(4):
        later = Arrival(0.02, 20, 64, then=later, group=f"polite {number}")
    assert later is not None
    later.at = 1 + number / 50
    return later


def test_polite_keys_wait_half_as_long_again_beside_a_greedy_one() -> None:
    """With an H200's step times and 32 places, ten keys get their answers in less than 1.5 times
    the time that they take alone, beside a key with 100 requests of 1,000 tokens."""
    times = DEVICES["h200"]
    limits = EngineConfig(2048, 32, 10_000, 16, 9000, times.max_num_batched_tokens, frozenset())
    p50 = []
    for num_greedy in (0, 100):
        policy = PrefillPolicy(times.max_num_batched_tokens, 0.35, 0.8)
        engine = SimulatedEngine(limits, times.seconds, policy, can_overlap_steps=True)
        greedy = [Arrival(0, 20, 1000, group="greedy") for _ in range(num_greedy)]
        ended = engine.run([*greedy, *map(polite, range(10))])
        answers = [each.answer_s for each in ended if each.group != "greedy"]
        assert len(answers) == 40
        p50.append(statistics.median(answers))
    assert p50[1] < 1.5 * p50[0]


@pytest.mark.parametrize("priority", [-1, 0, 1])
def test_a_sequence_never_replaces_one_of_smaller_priority(priority: int) -> None:
    """A request of another key replaces a running one of priority 0 unless its own is larger."""
    found = driver(max_num_seqs=2)
    for kind in range(3):
        found.add_of(SchedulingClass("greedy"), 8, 40, kind)
    found.step()
    other = found.add_of(SchedulingClass("other", priority), 8, 5)
    found.step()
    assert (other in found.scheduler.running) == (priority <= 0)


def test_a_group_alone_keeps_all_places() -> None:
    """Requests of one group never replace one another, whatever their priorities."""
    found = driver(max_num_seqs=2)
    first = [found.add_of(SchedulingClass("a"), 8, 20, kind) for kind in range(2)]
    found.step()
    found.add_of(SchedulingClass("a", -5), 8, 5)
    while not any(found.ended[sequence] for sequence in first):
        found.step()
    assert found.scheduler.num_preemptions == 0


@pytest.mark.parametrize(("num_groups", "expected"), [(1, 40), (2, 24), (5, 11)])
def test_greedy_groups_leave_room_for_another(num_groups: int, expected: int) -> None:
    """Each of k groups gets at most 2 / (2k + 1) of 60 places, and one is left for a new group."""
    queue = RequestQueue(20, 40, 1)
    taken: Counter[str] = Counter()
    for number in range(500):
        group = str(number % num_groups)
        try:
            queue.require_room(group)
        except QueueFull:
            continue
        queue.take_place(group)
        taken[group] += 1
    assert max(taken.values()) == expected
    queue.take_place("new")
