"""PrefillBudget: how many prompt tokens a step may compute beside running streams.

A step with decodes and part of a prompt may take `MAX_SLOWDOWN` times as long as a step of the
decodes alone. Readers hardly notice that, and prompts get nearly half of the device. The cost of a
decode step and of a prompt token is measured step by step, because it depends on the device, on the
number of decodes and on the context lengths.
"""

MAX_SLOWDOWN = 1.8
SMOOTHING = 0.3
"""Weight of the newest step in the moving averages."""
MIN_SHARE = 32
"""A prefill chunk has at least 1/32 of `max_num_batched_tokens`. Each chunk reads the keys and
values of the whole context before it, so very small chunks would take longest in total."""


class PrefillBudget:
    """Measures steps with `observe` and returns a limit with `max_tokens`."""

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._max_tokens = max_num_batched_tokens
        self._min_tokens = max(1, max_num_batched_tokens // MIN_SHARE)
        # Seconds of a step of decodes alone, by the bit length of their number: 1, 2-3, 4-7, ...
        self._decode_s: dict[int, float] = {}
        # Seconds that one prompt token adds to a step.
        self._token_s: float | None = None

    def max_tokens(self, num_decodes: int) -> int:
        """Prompt tokens for a step with `num_decodes` decodes; at least 1."""
        decode_s = self._decode_step_s(num_decodes)
        if decode_s is None or self._token_s is None:
            return self._max_tokens
        affordable = int(decode_s * (MAX_SLOWDOWN - 1) / self._token_s)
        return min(self._max_tokens, max(self._min_tokens, affordable))

    def observe(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        """Records the time of one step."""
        if not num_prompt_tokens:
            size = num_decodes.bit_length()
            self._decode_s[size] = _smooth(self._decode_s.get(size), seconds)
        elif not num_decodes:
            self._token_s = _smooth(self._token_s, seconds / num_prompt_tokens)
        elif (decode_s := self._decode_step_s(num_decodes)) is not None:
            added = max(seconds - decode_s, 0.1 * seconds)  # the measurement is noisy
            self._token_s = _smooth(self._token_s, added / num_prompt_tokens)

    def _decode_step_s(self, num_decodes: int) -> float | None:
        """Seconds of a step of decodes alone, measured with about `num_decodes` decodes.

        Without such a measurement, takes the nearest smaller number of decodes, else the smallest
        measured one. None without decodes, and before the first measurement.
        """
        if not num_decodes or not self._decode_s:
            return None
        size = num_decodes.bit_length()
        fewer = [known for known in self._decode_s if known <= size]
        return self._decode_s[max(fewer) if fewer else min(self._decode_s)]


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + SMOOTHING * (now - before)
