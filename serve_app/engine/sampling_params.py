"""Sampling parameters of one request."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.engine.constraint import Grammar


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The parameters that choose the tokens of one request. The API validates them.

    The sampler changes the model's logits in this order: logit_bias, repetition penalty, presence
    and frequency penalty, min_tokens (stop tokens are masked), grammar (tokens that it does not
    allow are masked), temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    """Generate at most this many tokens; 0 computes the prompt alone, to score it."""
    min_tokens: int = 0
    """No stop token can be chosen before this many tokens are generated."""
    temperature: float = 1.0
    """0 means greedy sampling."""
    top_p: float = 1.0
    """Keep the most probable tokens until their probabilities sum to top_p; 1 keeps all."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    min_p: float = 0.0
    """Drop tokens whose probability is below min_p times the highest probability."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same tokens in any batch."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """OpenAI's additive penalties; both count generated tokens only."""
    repetition_penalty: float = 1.0
    """The multiplicative penalty of CTRL (arXiv 1909.05858); it counts the prompt's tokens too."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop_token_ids: frozenset[int] = frozenset()
    """Ids that end the request besides the model's eos. The stop token is not returned."""
    ignore_eos: bool = False
    """Whether the model's eos tokens do not end the request."""
    logprobs: int | None = None
    """n: return the log probabilities of each sampled token and of the n most probable tokens at
    its position. None: return none."""
    prompt_logprobs: int | None = None
    """n: return the log probabilities of each prompt token except the first, and of the n most
    probable tokens at its position. The prompt is then computed without the prefix cache. None:
    return none."""
    grammar: Grammar | None = None
    """The grammar that the answer must match. The answer ends when the grammar is complete, even
    with `ignore_eos`."""
    prompt_field: str = "prompt"
    max_tokens_field: str = "max_tokens"
    """The request fields of the prompt and of `max_tokens`, for errors about them."""

    @property
    def is_filtered(self) -> bool:
        """Whether top_k, top_p or min_p drop tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0
