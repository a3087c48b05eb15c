"""What the engine takes: its limits, and a new request checked against them.

Everything refused here could never run; nothing has been started. Knows no queue.
"""

import secrets
from dataclasses import dataclass

from serve_app.engine.sequence import SamplingParams, Sequence
from serve_app.errors import ContextLengthExceeded, InvalidRequest


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits. Lengths in tokens."""

    max_model_len: int
    """Prompt and answer together."""
    max_num_seqs: int
    """Sequences in one step."""
    max_waiting: int
    """Sequences beyond `max_num_seqs` that may be alive; more are refused with `QueueFull`."""
    block_size: int
    """Tokens in one KV block."""
    num_blocks: int
    max_num_batched_tokens: int
    """Tokens in one step, prompts and decodes together; at least `max_num_seqs`."""
    eos_token_ids: frozenset[int]
    retry_after_s: int = 2
    keeps_prefixes: bool = True
    """Whether sequences share the KV blocks of what they begin with in common."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or running streams would stall one another."
            )

    @property
    def longest_sequence(self) -> int:
        """Tokens of prompt and answer that can run; the last one is returned, never computed."""
        return min(self.max_model_len, self.num_blocks * self.block_size + 1)


def admit(
    prompt_ids: list[int], params: SamplingParams, config: EngineConfig, vocab_size: int
) -> Sequence:
    """The sequence of a new request; raises `InvalidRequest` or `ContextLengthExceeded`."""
    if not prompt_ids:
        raise InvalidRequest("The prompt must not be empty.", param="prompt")
    for name, ids in (
        ("prompt", prompt_ids),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidRequest(
                f"The token ids of `{name}` must be between 0 and {vocab_size - 1}.", param=name
            )
    stop_ids = params.stop_token_ids
    if not params.ignore_eos:
        stop_ids |= config.eos_token_ids
    if params.min_tokens and len(stop_ids) >= vocab_size:
        raise InvalidRequest(
            "`min_tokens` needs a token that is not in `stop_token_ids`.", param="min_tokens"
        )
    num_tokens = len(prompt_ids) + params.max_tokens
    if num_tokens > config.longest_sequence:
        raise ContextLengthExceeded(
            f"The context holds {config.longest_sequence} tokens, and this request needs "
            f"{num_tokens} ({len(prompt_ids)} of the prompt and {params.max_tokens} of "
            "max_tokens); shorten the prompt or lower max_tokens."
        )
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return Sequence(list(prompt_ids), params, seed, stop_ids)
