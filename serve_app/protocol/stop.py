"""Stop strings: the text before the first one, and nothing of it.

Knows no tokens: text comes in pieces of any size, and the answer does not depend on how it was cut.
"""

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first, holding back what might become one.

    Of two that end at the same character the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""  # the last text that may belong to a stop string
        self._num_shown = 0  # characters at its beginning that are shown already
        self.found = False
        """True once a stop string has come; every later text is dropped."""

    def pass_over(self, text: str) -> str:
        """Shows text that ends nothing, but in which a stop string may begin.

        Only before the first `push`. Of a stop string that begins here and ends later the rest is
        cut.
        """
        longest = max(map(len, self._stops), default=1) - 1
        self._held = (self._held + text)[-longest:] if longest else ""
        self._num_shown = len(self._held)
        return text

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come: nothing that a stop string may cut."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        if (cut := self._first_stop(text)) is not None:
            self.found, self._held = True, ""
            return text[self._num_shown : cut]
        kept = len(text) - self._num_held(text)
        self._held, num_shown = text[kept:], self._num_shown
        self._num_shown = max(0, num_shown - kept)
        return text[num_shown:kept]

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held[self._num_shown :], ""
        self._num_shown = 0
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first in `text`."""
        found = []
        for stop in self._stops:
            # One that ends in what was passed over ended nothing.
            at = text.find(stop, max(0, self._num_shown - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        return min(found)[1] if found else None

    def _num_held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
