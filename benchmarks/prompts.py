"""Prompts and answer lengths of a load, drawn by a seed, so that each server gets the same.

Prompt lengths are in words, because the generator has no tokenizer. No two prompts begin alike,
except for the shared part that was asked for.
"""

import re
from dataclasses import dataclass

import numpy as np

WORDS = (
    "the a of and to in is it you that he was for on are with as they be at one have this from by "
    "hot word but what some we can out other were all there when up use your how said an each she "
    "count spell cat capital France Paris number day first people water long find now little year"
).split()


@dataclass(frozen=True)
class Lengths:
    """Lengths `64`, `16:128` (uniform) or `lognormal:64:0.5` (median, sigma)."""

    low: float
    high: float
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Raises `ValueError` for any other form."""
        found = re.fullmatch(r"(?:(\d+)|(\d+):(\d+)|lognormal:(\d+):([\d.]+))", text)
        if found is None:
            raise ValueError(f"{text!r} is not N, LOW:HIGH or lognormal:MEDIAN:SIGMA")
        fixed, low, high, median, sigma = found.groups()
        if median:
            lengths = cls(int(median), 8 * int(median), float(sigma))
        else:
            lengths = cls(int(fixed or low), int(fixed or high))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError(f"{text!r} must begin with 1 or more and end no lower")
        return lengths

    def draw(self, random: np.random.Generator) -> int:
        """Returns one length; lognormal ones are cut at 8 times the median."""
        if self.sigma is None:
            return int(random.integers(int(self.low), int(self.high), endpoint=True))
        drawn = self.low * float(np.exp(random.normal(0, self.sigma)))
        return max(1, round(min(drawn, self.high)))


@dataclass(frozen=True)
class Prompts:
    """The prompt and the answer length of each request."""

    words: Lengths
    tokens: Lengths
    shared: float = 0.0
    """The share of each prompt, from its beginning, that all prompts have in common."""
    seed: int = 0

    def draw(self, number: int) -> tuple[str, int]:
        """Returns the text and `max_tokens` of request `number`."""
        random = np.random.default_rng([self.seed, number])
        length = self.words.draw(random)
        tokens = self.tokens.draw(random)
        in_common = round(self.shared * length)
        first = np.random.default_rng([self.seed]).integers(0, len(WORDS), int(self.words.high))
        own = random.integers(0, len(WORDS), length)
        chosen = [*first[:in_common], *own[in_common:]]
        return " ".join(WORDS[word] for word in chosen), tokens
