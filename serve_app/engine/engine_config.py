"""EngineConfig: the limits of one engine."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineConfig:
    """The engine's limits. Lengths are in tokens."""

    max_model_len: int
    """Prompt and answer together."""
    max_num_seqs: int
    """Sequences in one step."""
    max_waiting: int
    """Requests accepted beyond `max_num_seqs`; more are refused with `QueueFull`."""
    block_size: int
    """Tokens in one KV block."""
    num_blocks: int
    """KV blocks in the cache."""
    max_num_batched_tokens: int
    """Tokens in one step, prompts and decodes together; at least `max_num_seqs`."""
    eos_token_ids: frozenset[int]
    max_stall_s: float = 0.35
    """Longest time of a step with prompt tokens beside running streams, in seconds."""
    prefill_share: float = 0.8
    """Share of the device's time that prompts get while prompts and streams both wait."""
    step_timeout_s: float = 60.0
    """Seconds after which a step has hung; or 10 times the longest step so far, if that is more."""
    retry_after_s: int = 2
    enable_prefix_caching: bool = True
    """Whether sequences share the KV blocks of a common prefix."""
    max_sequence_len: int = field(init=False)
    """Longest prompt and answer that can run. The last token is returned, never computed, so it
    needs no slot in the KV cache."""
    max_prompt_len: int = field(init=False)
    """Longest prompt that can run without an answer."""

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}), or running streams would stall one another."
            )
        num_slots = self.num_blocks * self.block_size
        object.__setattr__(self, "max_sequence_len", min(self.max_model_len, num_slots + 1))
        object.__setattr__(self, "max_prompt_len", min(self.max_model_len, num_slots))
