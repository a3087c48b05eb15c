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
        self._held = ""
        self.found = False
        """True once a stop string has come; every later text is dropped."""

    def push(self, text: str) -> str:
        """What may be shown now that `text` has come: never any part of a stop string."""
        if self.found or not self._stops:
            return "" if self.found else text
        text = self._held + text
        if (cut := self._first_stop(text)) is not None:
            self.found, self._held = True, ""
            return text[:cut]
        kept = len(text) - self._num_held(text)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first in `text`."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_held(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
