"""Sequence: one accepted request in the engine, its prompt and its answer as token ids.

SharedPrompt: several sequences with the same prompt, which only one of them computes.
"""

import secrets
import time
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from serve_app.engine.constraint import Constraint
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.scheduling_class import DEFAULT_CLASS, SchedulingClass

PENDING = -2
"""Placeholder in `token_ids` for the token that an in-flight step will sample."""
FAILED = -1
"""The sampler's result for a sequence whose logits are not finite."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids, how many of them are computed, and the KV blocks that hold their keys and values.

    Two sequences are never equal, so a sequence can be a key of a dict.
    """

    token_ids: list[int]
    """The prompt, then the generated tokens; the last one may be `PENDING`."""
    params: SamplingParams
    seed: int
    """A 64-bit seed: the request's, or a random one."""
    stop_ids: frozenset[int]
    """Ids that end the sequence: the request's and, unless `ignore_eos`, the model's."""
    is_list_item: bool = False
    """Whether the sequence belongs to a list of prompts. The whole list holds one place in the
    request queue, and its items hold none."""
    scheduling_class: SchedulingClass = DEFAULT_CLASS
    shared_prompt: "SharedPrompt | None" = None
    """Set if several sequences have the same prompt, which is computed once."""
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    """Maximum number of tokens, prompt and answer together. If `params.max_tokens` is 0, one token
    is sampled and discarded; it shows that the prompt is computed."""
    has_penalties: bool = field(init=False)
    """Whether the request has a penalty, which needs counts of the previous tokens."""
    constraint: Constraint | None = field(init=False)
    """The state of the request's grammar after the sampled tokens; None without a grammar."""
    number: int = 0
    """The position in the order of arrival, from 1."""
    rank: int = 0
    """Prompts are computed in ascending order of rank; see `waiting_sequences.py`."""
    num_computed_tokens: int = 0
    """Number of leading tokens with keys and values in the KV cache; 0 after a preemption."""
    num_scored_tokens: int = 0
    """Number of leading tokens whose logits have given the log probability of the next token.
    Used only with `params.prompt_logprobs`."""
    num_finite_tokens: int = 0
    """Number of leading tokens whose keys and values are known to be finite, because the logits
    computed from them were finite."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in the order of positions. A preemption replaces the list."""
    num_cached_blocks: int = 0
    """Number of leading blocks of `block_table` in the prefix cache. They may be shared and are
    never written again."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the leading full blocks, extended when more are needed."""
    arrival_time: float = field(default_factory=time.monotonic)
    """The time of arrival on the monotonic clock, in seconds."""
    num_prompt_cached: int | None = None
    """Number of prompt tokens found in the prefix cache; None before the first step."""
    queued_s: float | None = None
    """Seconds from arrival to the first step; None before that step."""
    sampler_state: Any = None
    """Token counts for the penalties. Their type is the sampler's (`penalties.py` or
    `sampling_rows.py`)."""

    def __post_init__(self) -> None:
        params = self.params
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max(params.max_tokens, 1)
        additive = params.presence_penalty, params.frequency_penalty
        self.constraint = None if params.grammar is None else params.grammar.start()
        self.has_penalties = additive != (0, 0) or params.repetition_penalty != 1

    @property
    def needs_scores(self) -> bool:
        """Whether some requested log probabilities of the prompt are not computed yet."""
        is_asked = self.params.prompt_logprobs is not None
        return is_asked and self.num_scored_tokens < self.num_prompt_tokens - 1

    @property
    def needs_last_token(self) -> bool:
        """Whether the host must read the last token before the next one can be sampled."""
        return self.has_penalties or self.constraint is not None

    @property
    def num_output_tokens(self) -> int:
        """Number of generated tokens, including a `PENDING` one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the sequence has `max_num_tokens` tokens. The last one may be `PENDING`."""
        return len(self.token_ids) >= self.max_num_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether the sequence is not complete and only its last token is not computed. The last
        token of a complete sequence is returned but never computed."""
        return self.num_computed_tokens == len(self.token_ids) - 1 and not self.is_complete


@dataclass(eq=False, slots=True)
class SharedPrompt:
    """The sequences of one prompt. Only the engine's thread changes it.

    The first sequence is the leader, which computes the prompt. The others wait until the leader
    has its first token, then share its full KV blocks. Example: a request has `n` = 4 and a prompt
    of 100 tokens. The leader computes 100 tokens; then each of the other three shares 6 blocks of
    16 tokens and computes the last 4 tokens itself.
    """

    leader: Sequence | None = None
    """The sequence that computes the prompt; None before it is added, and once it is computed."""
    is_computed: bool = False
    """Whether the prompt is computed."""
    followers: list[Sequence] = field(default_factory=list)
    """The sequences that wait for the leader; some of them may have ended."""
    salt: bytes = field(default_factory=lambda: secrets.token_bytes(16))
    """Hashed with the tokens of its KV blocks if prefix caching is off, so that only sequences of
    this prompt share the blocks."""

    def must_wait(self, sequence: Sequence) -> bool:
        """Adds a sequence. Returns True if it must wait because another one is the leader."""
        if self.is_computed:
            return False
        if self.leader is None:
            self.leader = sequence
            return False
        sequence.rank = self.leader.rank
        self.followers.append(sequence)
        return True

    def computed(self) -> list[Sequence]:
        """Records that the prompt is computed. Returns the sequences that have waited for it."""
        self.leader, self.is_computed = None, True
        released, self.followers = self.followers, []
        return released

    def removed(self, sequence: Sequence, waiting: Container[Sequence]) -> list[Sequence]:
        """Removes a sequence. If it was the leader, the next follower in `waiting` becomes it.

        Returns the new leader in a list, or an empty list.
        """
        if sequence is not self.leader:
            return []
        remaining = [follower for follower in self.followers if follower in waiting]
        self.leader = remaining[0] if remaining else None
        self.followers = remaining[1:]
        return remaining[:1]
