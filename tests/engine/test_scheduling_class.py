"""Groups of requests share the engine, and priorities come first."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.block_manager import BlockManager
from serve_app.engine.request_queue import RequestQueue
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import Sequence
from serve_app.errors import QueueFull
from tests.engine.scheduler_driver import Driver, new_sequence


def driver(max_num_seqs: int = 1) -> Driver:
    return Driver(Scheduler(BlockManager(200, 4), max_num_seqs, 64))


def add(driver: Driver, scheduling_class: SchedulingClass, num_prompt: int = 8) -> Sequence:
    sequence = new_sequence(num_prompt, 3)
    sequence.scheduling_class = scheduling_class
    driver.arrived.append(sequence)
    driver.scheduler.add(sequence)
    return sequence


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
    """While all three groups wait, none is ahead of another by more than the two largest
    prompts and answers of its time."""
    found = driver()
    waiting = Counter(group for group, _ in sizes)
    for group, size in sizes:
        add(found, SchedulingClass(group), size)
    served: Counter[str] = Counter()
    largest = 2 * (max(size for _, size in sizes) + 3)
    for sequence in order(found):
        if all(waiting[group] for group in "abc"):
            assert max(served[g] for g in "abc") - min(served[g] for g in "abc") <= largest
        group = sequence.scheduling_class.group
        waiting[group] -= 1
        served[group] += sequence.num_prompt_tokens + 3


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
