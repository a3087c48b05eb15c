"""Admission: checks a new request against the engine's limits and makes its sequence.

A request that is refused here can never run on this engine. No resource is allocated before.
"""

import secrets
from collections.abc import Collection

from serve_app.engine.engine_config import EngineConfig
from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.sequence import Sequence
from serve_app.errors import ContextLengthExceeded, InvalidRequest


def check_token_ids(ids: Collection[int], vocab_size: int, name: str) -> None:
    """Raises `InvalidRequest` if an id is not in the vocabulary. `name` is the request's field."""
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InvalidRequest(f"`{name}` has a token id outside 0 to {vocab_size - 1}.", param=name)


def admit(
    prompt_ids: list[int], params: SamplingParams, config: EngineConfig, vocab_size: int
) -> Sequence:
    """Returns the sequence of a new request.

    Raises `ContextLengthExceeded` if prompt and answer do not fit, and `InvalidRequest` for an
    empty prompt, a token id outside the vocabulary, or `min_tokens` if every token is a stop token.
    """
    if not prompt_ids:
        raise InvalidRequest("The prompt must not be empty.", param=params.prompt_field)
    # The last token of an answer needs no KV slot. The last token of a prompt needs one.
    longest = config.max_sequence_len if params.max_tokens else config.max_prompt_len
    if len(prompt_ids) + params.max_tokens > longest:
        raise _too_long(len(prompt_ids), params, longest)
    check_token_ids(prompt_ids, vocab_size, params.prompt_field)
    check_token_ids(params.logit_bias, vocab_size, "logit_bias")
    check_token_ids(params.stop_token_ids, vocab_size, "stop_token_ids")
    stop_ids = params.stop_token_ids
    if not params.ignore_eos:
        stop_ids |= config.eos_token_ids
    if params.min_tokens and len(stop_ids) >= vocab_size:
        raise InvalidRequest(
            "`min_tokens` needs a token that is not in `stop_token_ids`.", param="min_tokens"
        )
    seed = secrets.randbits(64) if params.seed is None else params.seed
    return Sequence(list(prompt_ids), params, seed, stop_ids)


def _too_long(
    num_prompt_tokens: int, params: SamplingParams, max_len: int
) -> ContextLengthExceeded:
    # Clients detect a full context by the beginning of OpenAI's sentence.
    room = max_len - num_prompt_tokens
    if room < 1:
        return ContextLengthExceeded(
            f"This model's maximum context length is {max_len} tokens, the answer included. "
            f"However, your {params.prompt_field} resulted in {num_prompt_tokens} tokens. Please "
            f"reduce the length of the {params.prompt_field}.",
            param=params.prompt_field,
        )
    field = params.max_tokens_field
    # A client may send a number of any length.
    max_tokens = str(params.max_tokens)[:64]
    return ContextLengthExceeded(
        f"This model's maximum context length is {max_len} tokens. However, your "
        f"{params.prompt_field} resulted in {num_prompt_tokens} tokens and `{field}` is "
        f"{max_tokens}; ask for {room} at most.",
        param=field,
    )
