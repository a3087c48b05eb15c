"""Stop strings do not depend on how the text was cut."""

from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol.stop import StopStrings

# Three letters, so that stop strings overlap each other and themselves.
LETTERS = st.text("abé", max_size=30)
STOPS = st.lists(st.text("abé", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], num_passed: int = 0) -> tuple[str, str | None]:
    """Returns the definition, character by character; the first `num_passed` end nothing."""
    for end in range(num_passed + 1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: max(end - len(longest), num_passed)], longest
    return text, None


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_any_cut_gives_the_same_text(pieces: list[str], stops: list[str]) -> None:
    """Returns the text before the stop string that is complete first, which it names."""
    stopper = StopStrings(stops)
    shown = "".join([stopper.push(piece) for piece in pieces])
    text, found = expected("".join(pieces), stops)
    assert (shown + stopper.flush(), stopper.found) == (text, found)


@given(st.lists(LETTERS, max_size=4), st.lists(LETTERS, max_size=4), STOPS)
def test_a_stop_string_may_begin_in_what_was_passed_over(
    passed: list[str], pieces: list[str], stops: list[str]
) -> None:
    """A stop string that ends later is found; what was shown stays, and its rest is not shown."""
    stopper = StopStrings(stops)
    shown = "".join([stopper.pass_over(piece) for piece in passed])
    assert shown == "".join(passed)
    shown += "".join([stopper.push(piece) for piece in pieces])
    text, found = expected("".join(passed + pieces), stops, len("".join(passed)))
    assert (shown + stopper.flush(), stopper.found) == (text, found)


@given(LETTERS, STOPS)
def test_as_much_is_shown_as_can_be(text: str, stops: list[str]) -> None:
    """Held back is only what some further text could turn into a stop string."""
    stopper = StopStrings(stops)
    shown = "".join([stopper.push(letter) for letter in text])
    if not stopper.found:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)
