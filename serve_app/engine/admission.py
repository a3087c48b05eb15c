"""Admission: checks a new request against the engine's limits and makes its sequence.

A request that is refused here could never run. Nothing has been started for it.
"""

import secrets

from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import Sequence
from serve_app.errors import ContextLengthExceeded, InvalidRequest


def admit(
    prompt_ids: list[int], params: SamplingParams, config: EngineConfig, vocab_size: int
) -> Sequence:
    """Returns the sequence of a new request; raises `InvalidRequest` or `ContextLengthExceeded`."""
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
    if num_tokens > config.max_sequence_len:
        raise ContextLengthExceeded(
            f"The context holds {config.max_sequence_len} tokens, and this request needs "
            f"{num_tokens} ({len(prompt_ids)} of the prompt and {params.max_tokens} of "
            "max_tokens); shorten the prompt or lower max_tokens."
        )
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return Sequence(list(prompt_ids), params, seed, stop_ids)
