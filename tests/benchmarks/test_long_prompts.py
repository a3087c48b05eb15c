"""Long prompts: which of a stream's gaps belong to a long prompt, and what is an error."""

import pytest

from benchmarks.load import Outcome
from benchmarks.long_prompts import Beside, beside_figures, beside_of, text
from benchmarks.running_server import RunningServer

PROMPT = Outcome(sent=1.0, arrivals=[2.0, 2.5], num_tokens=2)


def stream(*arrivals: float, error: str | None = "unfinished") -> Outcome:
    """Returns a stream that the load generator closed."""
    return Outcome(0.0, list(arrivals), error=error)


def test_gaps_are_sorted_by_the_prompts_times() -> None:
    """Gaps that overlap the time from the prompt to its first token are its own; later ones are
    not counted."""
    found = beside_of(stream(0.5, 0.75, 1.25, 1.5, 2.25, 2.3), PROMPT)
    assert found.before == [0.25]
    assert found.during == [0.5, 0.25, 0.75]
    assert found.first_token_s == 1.0
    assert found.error is None


@pytest.mark.parametrize(
    ("made", "prompt", "error"),
    [
        (stream(0.5, error=None), PROMPT, "the stream ended before the prompt's first token"),
        (stream(0.5, error="status 500"), PROMPT, "status 500"),
        (stream(1.5), PROMPT, "the stream began after the prompt"),
        (stream(), PROMPT, "the stream began after the prompt"),
        (stream(0.5), Outcome(1.0, error="status 429"), "status 429"),
        (stream(0.5), Outcome(1.0), "no text"),
    ],
)
def test_a_run_that_says_nothing_is_an_error(made: Outcome, prompt: Outcome, error: str) -> None:
    """A stream that ended or began late, and a failed request, have no gaps."""
    assert beside_of(made, prompt) == Beside(error=error)


def test_figures_are_of_all_runs_together() -> None:
    """The longest gap is that of all runs; a failed run is counted, with its reason."""
    runs = [Beside([0.01], [0.1, 0.3], 1.0), Beside([0.03], [0.2], 2.0), Beside(error="no text")]
    found = beside_figures(runs)
    assert found["longest_gap_ms"] == 300
    assert found["ttft_ms"]["p50"] == 1500
    assert found["gap_before_ms"]["p50"] == pytest.approx(20)
    assert (found["errors"], found["error_kinds"]) == (1, ["no text"])
    assert "longest_gap_ms" not in beside_figures([Beside(error="no text")])


def test_no_two_prompts_begin_alike() -> None:
    """Prompts of any two lengths differ in their first words, so no prefix cache has them."""
    server = RunningServer("http://nowhere", "tiny")
    texts = [text(server, size) for size in (450, 450, 1800)]
    assert len({tuple(each.split()[:3]) for each in texts}) == 3
    assert [len(each.split()) for each in texts] == [260, 260, 1040]
