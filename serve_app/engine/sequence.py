"""Sequence: one accepted request in the engine, its prompt and its answer as token ids."""

import time
from dataclasses import dataclass, field
from typing import Any

from serve_app.engine.constraint import Constraint
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.shared_prompt import SharedPrompt
from serve_app.engine.turn import ANYONE, Turn

PENDING = -2
"""Placeholder in `token_ids` for the token that a step in flight will sample."""
FAILED = -1
"""Sampled instead of a token when a sequence's logits are not finite."""


@dataclass(eq=False, slots=True)
class Sequence:
    """Token ids, how many of them are computed, and the KV blocks that hold their keys and values.

    Two sequences are never equal, so a sequence can be a key of a dict.
    """

    token_ids: list[int]
    """The prompt, then the generated tokens; the last one may be `PENDING`."""
    params: SamplingParams
    seed: int
    """64 bits: the request's own, or drawn when the request was accepted."""
    stop_ids: frozenset[int]
    """Ids that end the sequence: the request's own and, unless `ignore_eos`, the model's."""
    is_list_item: bool = False
    """Whether it belongs to a list of prompts, which has a place of the request queue."""
    turn: Turn = ANYONE
    shared_prompt: SharedPrompt | None = None
    """Set where other sequences have the same prompt and wait for it."""
    num_prompt_tokens: int = field(init=False)
    max_num_tokens: int = field(init=False)
    """Prompt and answer together. With `params.max_tokens` of 0 one token is sampled, which nobody
    gets: it shows that the prompt is computed."""
    has_penalties: bool = field(init=False)
    """Whether a penalty counts the tokens before."""
    constraint: Constraint | None = field(init=False)
    """The state of the request's grammar behind the tokens that have been sampled."""
    number: int = 0
    """The scheduler's count of arrivals."""
    rank: int = 0
    """Prompts are computed in this order; see `scheduler.py`."""
    num_computed_tokens: int = 0
    """Leading tokens with keys and values in the KV cache; 0 after a preemption."""
    num_scored_tokens: int = 0
    """Leading tokens whose logits have scored the next one, where the prompt is scored."""
    num_finite_tokens: int = 0
    """Leading tokens whose keys and values are finite, as the logits after them have shown."""
    block_table: list[int] = field(default_factory=list)
    """KV blocks in the order of positions. A preemption replaces the list."""
    num_cached_blocks: int = 0
    """Leading blocks of `block_table` in the prefix cache: shared, and never written again."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Hashes of the leading full blocks, as far as they have been needed."""
    arrival_time: float = field(default_factory=time.monotonic)
    num_prompt_cached: int | None = None
    """Tokens of the prompt that the first step found in the prefix cache; None before it."""
    queued_s: float | None = None
    """Seconds from arrival to the first step; None before that step."""
    sampler_state: Any = None
    """Token counts for the penalties, of `penalties.py` or of `sampling_rows.py`."""

    def __post_init__(self) -> None:
        params = self.params
        self.num_prompt_tokens = len(self.token_ids)
        self.max_num_tokens = self.num_prompt_tokens + max(params.max_tokens, 1)
        additive = params.presence_penalty, params.frequency_penalty
        self.constraint = None if params.grammar is None else params.grammar.start()
        self.has_penalties = additive != (0, 0) or params.repetition_penalty != 1

    @property
    def needs_scores(self) -> bool:
        """Whether log probabilities of its prompt are still to be computed."""
        is_asked = self.params.prompt_logprobs is not None
        return is_asked and self.num_scored_tokens < self.num_prompt_tokens - 1

    @property
    def needs_last_token(self) -> bool:
        """Whether its next token can be sampled only after the host has read the last one."""
        return self.has_penalties or self.constraint is not None

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, a `PENDING` one included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_complete(self) -> bool:
        """Whether it has `max_num_tokens` tokens, the last of which may be `PENDING`."""
        return len(self.token_ids) >= self.max_num_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether its last token is the only one that is not computed. The last token of a complete
        sequence is in flight and is never computed."""
        return self.num_computed_tokens == len(self.token_ids) - 1 and not self.is_complete
