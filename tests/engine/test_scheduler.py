"""The scheduler keeps its limits in every step, preempts, and shares cached blocks."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.engine.block_manager import BlockManager
from serve_app.engine.scheduled_tokens import ScheduledTokens
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.scheduling_class import SchedulingClass
from serve_app.engine.sequence import PENDING, Sequence
from tests.engine.scheduler_driver import Driver, new_sequence

CLASSES = st.builds(SchedulingClass, st.sampled_from(["", "a", "b"]), st.integers(0, 1))
EVENTS = st.lists(
    st.one_of(
        # a new request: class, prompt, max_tokens, kind
        st.tuples(CLASSES, st.integers(1, 20), st.integers(1, 12), st.integers(0, 2)),
        st.integers(0, 30),  # the one with this number leaves
        st.none(),  # a step
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(
    st.integers(1, 6),
    st.integers(0, 10),
    st.integers(1, 5),
    st.integers(0, 8),
    st.booleans(),
    EVENTS,
)
def test_every_sequence_ends_once_within_all_limits(
    max_num_seqs: int,
    more_tokens: int,
    block_size: int,
    more_blocks: int,
    enable_prefix_caching: bool,
    events: list[object],
) -> None:
    """For any arrivals and aborts, steps keep all limits, the latest arrivals are preempted, no
    prompt is passed by more tokens than it has, and all sequences end once.

    With shared blocks too, each sequence finds its own tokens in its block table.
    """
    num_blocks = -(-31 // block_size) + more_blocks  # 31 tokens: the longest request alone
    blocks = BlockManager(num_blocks, block_size)
    driver = Driver(
        Scheduler(blocks, max_num_seqs, max_num_seqs + more_tokens, enable_prefix_caching)
    )
    left: set[Sequence] = set()
    for event in events:
        match event:
            case (SchedulingClass() as each, int(num_prompt), int(max_tokens), int(kind)):
                driver.add_of(each, num_prompt, max_tokens, kind)
            case int(number) if number < len(driver.arrived):
                left.add(driver.arrived[number])
                driver.abort(driver.arrived[number])
            case None:
                driver.step()
    for _ in range(5000):
        if not driver.step():
            break
    assert driver.ended == Counter(driver.arrived)
    assert blocks.num_used == 0
    for sequence in set(driver.arrived) - left:
        assert sequence.num_output_tokens == sequence.params.max_tokens


def test_the_latest_arrival_is_preempted_and_computes_everything_anew() -> None:
    """When blocks run out, the second of two waits, then resumes from its prompt and its tokens."""
    blocks = BlockManager(6, 4)
    driver = Driver(
        Scheduler(blocks, max_num_seqs=2, max_num_batched_tokens=16, enable_prefix_caching=False)
    )
    first, second = driver.add(8, 13), driver.add(7, 9)
    while not driver.scheduler.num_preemptions:
        driver.step()
    assert list(driver.scheduler.waiting) == [second]
    kept = second.num_output_tokens
    assert kept > 0
    while not driver.ended[first]:
        assert [sequence for sequence, *_ in driver.step()] == [first]
    assert driver.step() == [ScheduledTokens(second, 0, 7 + kept, is_sampled=True)]
    while driver.step():
        pass
    assert second.num_output_tokens == 9


def test_queue_time_ends_with_the_first_step() -> None:
    """`queued_s` counts from arrival to the first step; a preemption does not change it."""
    driver = Driver(Scheduler(BlockManager(6, 4), max_num_seqs=2, max_num_batched_tokens=16))
    first, second, third = driver.add(8, 13), driver.add(7, 9), driver.add(7, 1)
    driver.step()
    waited = [sequence.queued_s for sequence in (first, second, third)]
    assert waited[0] is not None
    assert waited[1] is not None
    assert waited[2] is None
    assert 0 <= waited[0] <= waited[1] + second.arrival_time - first.arrival_time
    while driver.step():
        pass
    assert driver.scheduler.num_preemptions > 0
    assert [first.queued_s, second.queued_s] == waited[:2]
    assert (third.queued_s or 0) > waited[1]


def test_a_second_turn_computes_only_what_is_new() -> None:
    """A prompt that continues an earlier one starts after its full blocks; without cache, at 0."""
    for enable_prefix_caching, start in ((True, 16), (False, 0)):
        blocks = BlockManager(64, 4)
        driver = Driver(
            Scheduler(
                blocks, 4, max_num_batched_tokens=64, enable_prefix_caching=enable_prefix_caching
            )
        )
        first = driver.add(11, 8)
        while driver.step():
            pass
        assert blocks.num_used == 0
        second = driver.add(11 + 8 + 5, 3)
        (chunk,) = driver.step()
        # The first one's last token was returned and never computed: 18 tokens, 4 full blocks.
        assert chunk == ScheduledTokens(second, start, 24, is_sampled=True)
        assert driver.scheduler.prefix_cache_hits == start
        assert first.num_output_tokens == 8


def test_a_fully_cached_prompt_computes_its_last_block() -> None:
    """The step needs logits, so the last block is computed again, in a block of its own."""
    driver = Driver(Scheduler(BlockManager(64, 4), max_num_seqs=4, max_num_batched_tokens=64))
    first = driver.add(8, 30)
    driver.step()
    second = driver.add(8, 30)
    chunks = driver.step()
    assert chunks[1] == ScheduledTokens(second, 4, 8, is_sampled=True)
    assert second.block_table[0] == first.block_table[0]
    assert second.block_table[1] != first.block_table[1]


def test_cached_blocks_are_evicted_when_room_is_needed() -> None:
    """A cache full of unused blocks admits as many as an empty one, and evicts the least recently
    used."""
    driver = Driver(Scheduler(BlockManager(8, 4), max_num_seqs=2, max_num_batched_tokens=64))
    for kind in (1, 2):
        driver.add(16, 1, kind)
        while driver.step():
            pass
    driver.add(20, 1, kind=3)  # shares the first block with both, and takes three of kind 1
    driver.step()
    for kind, known in ((2, 12), (1, 4)):
        sequence = driver.add(16, 1, kind)
        (chunk,) = driver.step()
        assert (chunk.sequence, chunk.start) == (sequence, known)


def test_only_cache_blocks_makes_blocks_shareable() -> None:
    """Without `cache_blocks`, the next sequence with the same prompt computes it again."""
    scheduler = Scheduler(BlockManager(64, 4), max_num_seqs=4, max_num_batched_tokens=64)
    failed = new_sequence(16, 4)
    scheduler.add(failed)
    scheduler.schedule()
    failed.num_computed_tokens = 16
    scheduler.remove(failed)
    scheduler.add(again := new_sequence(16, 4))
    assert scheduler.schedule() == [ScheduledTokens(again, 0, 16, is_sampled=True)]


def test_a_stream_decodes_in_each_step_of_a_long_prompt() -> None:
    """A prompt of five steps' tokens is cut into prefill chunks; a stream decodes beside each."""
    driver = Driver(Scheduler(BlockManager(64, 4), max_num_seqs=4, max_num_batched_tokens=10))
    stream = driver.add(2, 30)
    driver.step()
    prompt = driver.add(50, 1)
    chunks: list[tuple[int, int]] = []
    while not driver.ended[prompt]:
        step = driver.step()
        assert step[0].sequence is stream
        assert len(step) == 2
        chunks.append((step[1].start, step[1].end))
    assert chunks == [(0, 9), (9, 18), (18, 27), (27, 36), (36, 45), (45, 50)]


def test_a_step_never_looks_at_the_queue_behind_its_head() -> None:
    """With all places taken, a step touches no waiting sequence, so their number costs nothing."""
    driver = Driver(Scheduler(BlockManager(8, 4), max_num_seqs=1, max_num_batched_tokens=8))
    driver.add(4, 5)
    driver.step()

    class Untouchable(set[Sequence]):
        def __iter__(self) -> object:  # type: ignore[override]
            raise AssertionError("walked through the queue")

    driver.add(4, 4)
    waiting = driver.scheduler.waiting
    waiting._sequences = Untouchable(waiting._sequences)
    assert len(driver.scheduler.schedule()) == 1


def test_a_sequence_with_its_last_token_in_flight_is_not_scheduled() -> None:
    """A complete sequence takes no block for its last token, which is never computed."""
    scheduler = Scheduler(BlockManager(1, 4), 2, 8)
    sequence = new_sequence(4, max_tokens=1)
    scheduler.add(sequence)
    (chunk,) = scheduler.schedule()
    sequence.num_computed_tokens = chunk.end
    sequence.token_ids.append(PENDING)
    assert scheduler.has_work
    assert scheduler.schedule() == []
    assert scheduler.num_preemptions == 0


def test_blocks_of_a_step_in_flight_are_not_cached() -> None:
    """A block that a step in flight fills may hold a NaN; it is cached after the step."""
    scheduler = Scheduler(BlockManager(8, 4), 2, 8)
    sequence = new_sequence(7, max_tokens=9)
    scheduler.add(sequence)
    scheduler.schedule()
    sequence.token_ids.append(PENDING)
    sequence.num_computed_tokens = 8  # the first step is known, the second one runs
    scheduler.cache_blocks(sequence, 7)
    assert sequence.num_cached_blocks == 1
    scheduler.cache_blocks(sequence, 8)
    assert sequence.num_cached_blocks == 2


def test_short_prompts_pass_a_long_one_that_keeps_its_blocks() -> None:
    """A prompt of five steps pauses for short prompts that come after it, and goes on where it was;
    one as long as itself comes after it."""
    driver = Driver(Scheduler(BlockManager(64, 4), max_num_seqs=8, max_num_batched_tokens=10))
    long = driver.add(50, 1)
    driver.step()
    table = long.block_table
    short, second = driver.add(9, 1, kind=1), driver.add(50, 1, kind=2)
    assert [(part.sequence, part.start, part.end) for part in driver.step()] == [
        (short, 0, 9),
        (long, 10, 11),
    ]
    assert long.block_table is table
    while not driver.ended[long]:
        assert second not in driver.admitted
        driver.step()
    while driver.step():
        pass
    assert driver.ended[second]


def test_a_long_prompt_does_not_starve() -> None:
    """While short prompts fill every step, a long one is passed by fewer tokens than it has."""
    driver = Driver(
        Scheduler(
            BlockManager(64, 4),
            max_num_seqs=8,
            max_num_batched_tokens=10,
            enable_prefix_caching=False,
        )
    )
    long = driver.add(50, 1)
    while not driver.ended[long]:
        driver.add(10, 1)
        driver.step()
    assert len(driver.passed_by[long]) == 3
    assert len(driver.arrived) == 9
