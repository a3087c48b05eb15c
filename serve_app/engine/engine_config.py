"""EngineConfig: the limits of one engine."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits. Lengths are in tokens."""

    max_model_len: int
    """Maximum length of prompt and answer together."""
    max_num_seqs: int
    """Maximum number of sequences in one step."""
    max_waiting: int
    """Maximum number of requests beyond `max_num_seqs`. Further ones are refused with
    `QueueFull`."""
    block_size: int
    """Tokens in one KV block."""
    num_blocks: int
    """KV blocks in the cache."""
    max_num_batched_tokens: int
    """Maximum number of tokens in one step, prompts and decodes together; at least
    `max_num_seqs`."""
    eos_token_ids: frozenset[int]
    """Token ids that end an answer unless a request sets `ignore_eos`."""
    max_stall_s: float = 0.35
    """Maximum time of a step with prompt tokens while streams are running, in seconds."""
    prefill_share: float = 0.8
    """Share of the device's time that prompts get while prompts and streams both wait."""
    step_timeout_s: float = 60.0
    """A step counts as hung after this many seconds, or after 10 times the longest step so far,
    whichever is longer."""
    retry_after_s: int = 2
    """Minimum `Retry-After` of a refused request, in seconds."""
    enable_prefix_caching: bool = True
    """Whether sequences share the KV blocks of a common prefix."""
    max_sequence_len: int = field(init=False)
    """Maximum length of prompt and answer that fits into the KV cache. The last token is returned
    but never computed, so it needs no slot in the cache."""
    max_prompt_len: int = field(init=False)
    """Maximum length of a prompt that is only scored (`max_tokens` 0)."""

    def __post_init__(self) -> None:
        """Raises `ValueError` if `max_num_batched_tokens` is below `max_num_seqs`."""
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or running streams would stall one another."
            )
        num_slots = self.num_blocks * self.block_size
        object.__setattr__(self, "max_sequence_len", min(self.max_model_len, num_slots + 1))
        object.__setattr__(self, "max_prompt_len", min(self.max_model_len, num_slots))
