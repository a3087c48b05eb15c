"""How much of a prompt goes into one step, so that running streams keep their pace.

A step that decodes and computes part of a prompt may take `MAX_SLOWDOWN` times as long as one that
only decodes: a reader hardly sees it, and prompts get nearly half of the device. What a decode and
a prompt's token cost is measured, step by step: it depends on the device, on how many decode, and
on how long the contexts are. Knows no sequences.
"""

MAX_SLOWDOWN = 1.8
SMOOTHING = 0.3
"""Weight of the newest step in what is remembered."""
LEAST_SHARE = 32
"""A prompt gets at least this part of the largest step: each piece has to read its whole context
anew, so that small pieces would take the longest, and slow the streams for longer."""


class Pace:
    """Learns from every step; says how many prompt tokens the next one may have."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._most = max_num_batched_tokens
        self._least = max(1, max_num_batched_tokens // LEAST_SHARE)
        # Seconds of a step that only decodes, by the power of two below the number of sequences.
        self._decode_s: dict[int, float] = {}
        # Seconds that a prompt's token adds to a step.
        self._token_s: float | None = None

    def prompt_tokens(self, num_decodes: int) -> int:
        """For a step in which `num_decodes` sequences decode."""
        alone = self._decode_seconds(num_decodes)
        if alone is None or self._token_s is None:
            return self._most
        affordable = int(alone * (MAX_SLOWDOWN - 1) / self._token_s)
        return min(self._most, max(self._least, affordable))

    def learn(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """What a step of so many decodes and prompt tokens took."""
        if not num_prompt_tokens:
            size = num_decodes.bit_length()
            self._decode_s[size] = _smooth(self._decode_s.get(size), seconds)
        elif not num_decodes:
            self._token_s = _smooth(self._token_s, seconds / num_prompt_tokens)
        elif (alone := self._decode_seconds(num_decodes)) is not None:
            added = max(seconds - alone, 0.1 * seconds)  # what is measured is noisy
            self._token_s = _smooth(self._token_s, added / num_prompt_tokens)

    def _decode_seconds(self, num_decodes: int) -> float | None:
        """As measured for about as many, rather fewer; None for no decodes, or before any."""
        if not num_decodes or not self._decode_s:
            return None
        size = num_decodes.bit_length()
        fewer = [known for known in self._decode_s if known <= size]
        return self._decode_s[max(fewer) if fewer else min(self._decode_s)]


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)
