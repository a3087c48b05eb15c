"""Fields of other servers' APIs that have no effect here, and fields that would change the answer.

A field passes if its value requests the default behavior. Any other value is refused.
"""

from typing import Any

IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that are accepted with any value and not used: they do not change the answer."""

Unsupported = dict[str, tuple[tuple[Any, ...], str]]
"""Maps a field to its accepted values and the reason why other values are refused."""

_ONE = "this route gives one answer; use /v1/chat/completions or /v1/completions"
_CHAT_TOOLS = "use /v1/chat/completions, /v1/responses or /v1/messages for tools"
_NO_BEAMS = "there is no beam search"
_TEXT_ONLY = "prompts are text"
_NEW_NAME = "use `structured_outputs`"

OPENAI: Unsupported = {
    "audio": ((), "there is no audio"),
    "best_of": ((1,), _ONE),
    "function_call": (("none", "auto"), "use `tool_choice`"),
    "functions": (([],), "use `tools`"),
    "modalities": ((["text"],), "answers are text"),
    "moderation": ((), "there is no moderation"),
    "n": ((1,), _ONE),
    "parallel_tool_calls": ((True, False), _CHAT_TOOLS),
    "suffix": (("",), "text is continued at its end only"),
    "tool_choice": (("none", "auto"), _CHAT_TOOLS),
    "tools": (([],), _CHAT_TOOLS),
    "verbosity": (("medium",), "ask for a short answer in words"),
    "web_search_options": ((), "there is no web search"),
}
"""Fields of OpenAI's API."""

VLLM: Unsupported = {
    "add_generation_prompt": ((True,), "the answer is always a new message"),
    "add_special_tokens": ((False,), "the chat template brings its own"),
    "allowed_token_ids": (([],), "use `logit_bias`"),
    "bad_words": (([],), "use `logit_bias`"),
    "cache_salt": ((), "the prefix cache is shared by all requests"),
    "chat_template": ((), "the model's own template is used"),
    "chat_template_kwargs": (
        ({}, {"enable_thinking": False}),
        "the model's own template takes no parameters",
    ),
    "continue_final_message": ((False,), "the answer is always a new message"),
    "detokenize": ((True,), "answers are text"),
    "documents": (([],), "put the documents into a message"),
    "early_stopping": ((False,), _NO_BEAMS),
    "echo": ((False,), "only /v1/completions repeats its prompt"),
    "guided_choice": (([],), _NEW_NAME),
    "guided_grammar": ((), _NEW_NAME),
    "guided_json": ((), _NEW_NAME),
    "guided_regex": ((), _NEW_NAME),
    "include_reasoning": ((True, False), "this model does not reason separately"),
    "include_stop_str_in_output": ((False,), "the answer ends before the stop string"),
    "kv_transfer_params": (({},), "prompts are computed where they are answered"),
    "length_penalty": ((1,), _NO_BEAMS),
    "logits_processors": (([],), "use `logit_bias`"),
    "logprobs": ((False,), "use /v1/chat/completions or /v1/completions"),
    "media_io_kwargs": (({},), _TEXT_ONLY),
    "mm_processor_kwargs": (({},), _TEXT_ONLY),
    "prompt_logprobs": ((), "use /v1/completions or /v1/chat/completions"),
    "return_token_ids": ((False,), "use /tokenize"),
    "return_tokens_as_token_ids": ((False,), "tokens are returned as text"),
    # Changes nothing for a tokenizer that writes spaces as a part of tokens, as Mixtral's does.
    "spaces_between_special_tokens": ((True, False), "it is true or false"),
    "top_logprobs": ((0,), "use /v1/chat/completions"),
    "truncate_prompt_tokens": ((), "a prompt is never cut"),
    "use_beam_search": ((False,), _NO_BEAMS),
    "vllm_xargs": (({},), "there are no extensions of vLLM"),
}
"""Fields of vLLM's API, and of the `sampling_params` of RunPod's vLLM worker."""

UNSUPPORTED: Unsupported = OPENAI | VLLM
"""A route that supports one of these fields does not use this table for it."""


def check_is_neutral(unsupported: Unsupported, name: str, value: Any) -> str | None:
    """Returns the reason why `value` of the field `name` is refused; None if it passes."""
    neutral, reason = unsupported[name]
    # True == 1 in Python, but `"n": true` is an error.
    is_neutral = any(
        isinstance(value, bool) == isinstance(accepted, bool) and value == accepted
        for accepted in neutral
    )
    return None if is_neutral else reason
