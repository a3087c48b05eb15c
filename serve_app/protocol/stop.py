"""StopStrings: cuts a text before the first stop string.

The text may arrive in pieces of any size; the result does not depend on the pieces. Example with
the stop string "END": push("a E") returns "a ", because "E" may be the beginning of "END";
push("x") returns "Ex"; push("END") returns "" and sets `found`.
"""

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that ends first, and withholds text that may begin a stop string.

    If two stop strings end at the same character, the longer one is used.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""
        """The end of the text, which may belong to a stop string."""
        self._num_shown = 0
        """Number of characters at the beginning of `_held` that were already returned."""
        self.found: str | None = None
        """The stop string that was found; later text is dropped."""

    def pass_over(self, text: str) -> str:
        """Returns `text` unchanged: a stop string may begin in it, but must not end in it.

        Call it only before the first `push`. If a stop string begins in `text` and ends later, only
        the part after `text` is cut.
        """
        longest = max(map(len, self._stops), default=1) - 1
        self._held = (self._held + text)[-longest:] if longest else ""
        self._num_shown = len(self._held)
        return text

    def push(self, text: str) -> str:
        """Adds `text`. Returns the text that cannot belong to a stop string any more."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        if (first := self._first_stop(text)) is not None:
            (cut, self.found), self._held = first, ""
            return text[self._num_shown : cut]
        num_safe = len(text) - self._num_held(text)
        self._held, num_shown = text[num_safe:], self._num_shown
        self._num_shown = max(0, num_shown - num_safe)
        return text[num_shown:num_safe]

    def flush(self) -> str:
        """Returns the withheld text. Call it when no more text will come."""
        held, self._held = self._held[self._num_shown :], ""
        self._num_shown = 0
        return held

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Returns the start and the stop string that ends first in `text`; None if there is
        none."""
        matches = []
        for stop in self._stops:
            # A stop string that ends in passed-over text does not count.
            at = text.find(stop, max(0, self._num_shown - len(stop) + 1))
            if at >= 0:
                matches.append((at + len(stop), at, stop))
        return min(matches)[1:] if matches else None

    def _num_held(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if text[-length] not in self._first_chars:  # as nearly always
                continue
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
