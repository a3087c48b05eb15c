"""What the engine is asked and what it answers: sampling parameters, deltas, sequences, chunks.

Plain data. Knows no scheduling and no tensors.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are chosen. Validated by whoever builds it, immutable after.

    The order of operations on the raw logits is: logit_bias, repetition penalty, presence and
    frequency penalty, min_tokens and banned stops, temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    """Generate at most this many tokens (at least 1)."""
    min_tokens: int = 0
    """Before this many tokens no stop token can be chosen."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens whose probability is below min_p times that of the most probable one."""
    seed: int | None = None
    """Same seed, prompt and parameters: the same tokens, in any company."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """OpenAI's additive penalties; they look at generated tokens only."""
    repetition_penalty: float = 1.0
    """The multiplicative penalty of CTRL (arXiv 1909.05858); it looks at the prompt too."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the request besides the model's eos. The stop token is not returned."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n: the chosen token's log probability and those of the n most probable."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log probabilities at one position, of the model's own distribution (before penalties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, log probability) of the most probable tokens, best first."""


@dataclass(slots=True)
class Delta:
    """Everything new of one request since its consumer last looked; the last one is terminal."""

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    """One for each of `token_ids` when the request asked for them, else empty."""
    finish_reason: FinishReason | None = None
    """Set on the last delta only, and exactly once."""
    error: BaseException | None = None
    """Why, when `finish_reason` is "error"."""
    queued_s: float | None = None
    """Seconds that the request waited for its first step; None while it has had none."""


@dataclass(eq=False, slots=True)
class Sequence:
    """One accepted request on its way: its tokens, how many are computed, and its KV blocks."""

    token_ids: list[int]
    """The prompt, then what was generated; the last one may be `PENDING`."""
    params: SamplingParams
    seed: int
    """64 bits: the request's own, or drawn once when it was accepted."""
    stop_ids: frozenset[int]
    """The ids that end it: its own and, unless `ignore_eos`, the model's."""
    num_prompt: int = field(init=False)
    most_tokens: int = field(init=False)
    """Prompt and answer together, where nothing else ends it."""
    num_computed: int = 0
    """How many of `token_ids` have keys and values in the cache; a preemption sets it to 0."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in the order of positions. A preemption replaces the list."""
    num_kept: int = 0
    """Leading blocks of the table that others may share: never written again."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of its leading blocks' tokens, as far as anybody has asked."""
    arrived: float = field(default_factory=time.monotonic)
    queued_s: float | None = None
    """Seconds from its arrival until it first ran; None before."""
    sampler_state: Any = None
    """What the sampler remembers of it (token counts); nobody else looks inside."""

    def __post_init__(self) -> None:
        self.num_prompt = len(self.token_ids)
        self.most_tokens = self.num_prompt + self.params.max_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def is_complete(self) -> bool:
        """Whether it has all its tokens, the last of which may be `PENDING`."""
        return len(self.token_ids) >= self.most_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed


class Chunk(NamedTuple):
    """The tokens `start` to `end` (exclusive) of a sequence: its part of one step."""

    sequence: Sequence
    start: int
    end: int
    samples: bool
    """Whether it reaches the sequence's last token, so that the step yields the next one."""

    @property
    def is_decode(self) -> bool:
        """Whether it is one token after others that are computed."""
        return self.samples and 0 < self.start == self.end - 1


class Samples(NamedTuple):
    """What a step yields: one token for each chunk that samples, in the order of the chunks."""

    token_ids: list[int]
    """`FAILED` where the logits were not finite."""
    logprobs: dict[int, TokenLogprob]
    """By index into `token_ids`, for the sequences that asked."""


PENDING = -2
"""Stands in `token_ids` for the token that a step under way will give."""
FAILED = -1
"""Stands for the token that non-finite logits could not give."""
