"""Environment variables that users of vLLM and RunPod already set, and how each maps to a setting.

A setting has one such name by rule:

* A field of several words is its own name: `MAX_MODEL_LEN` sets `engine.max_model_len`.
* A field of one word needs its section: `MODEL_NAME` sets `model.name`. A bare `NAME`, `DEVICE`,
  `START` or `VOLUME` occurs in containers for other purposes, so it sets nothing.

The rule leaves out `NOT_BY_RULE`. `EXTRA_NAMES` are the names that do not follow it. The functions
take the environment as an argument; `settings.py` is the only module that reads it.
"""

from collections.abc import Mapping
from functools import cache

from serve_app.config.sections import SECTIONS

EXTRA_NAMES = {
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "model.served_model_name",
    "QUANTIZATION": "model.quantization",
    "DTYPE": "model.dtype",
    "REQUEST_TIMEOUT": "api.request_timeout_s",
    "BASE_PATH": "runpod.volume",
}
"""Names of RunPod's vLLM worker that do not follow the rule, and the setting that each one sets."""

NOT_BY_RULE = {
    "model.cache_dir": "other programs in a container read CACHE_DIR",
    "engine.num_threads": "other programs in a container read NUM_THREADS",
    "runpod.volume": "RunPod owns the names that begin with RUNPOD_",
    "runpod.start": "RunPod owns the names that begin with RUNPOD_",
}
"""Settings whose name by rule could be set for another purpose, and that purpose. Only their
`MIXTRAL_*` name sets them."""

_RESPONSE_CHUNKS = "a response chunk holds all text since the last one was sent"
_CHECKPOINT = "the checkpoint's own is used"
_ONE_GPU = "one GPU holds the model"
_TOOLS = "tool calls are not supported; a request that asks for them gets an error"

UNUSED_NAMES = {
    "DEFAULT_BATCH_SIZE": _RESPONSE_CHUNKS,
    "MIN_BATCH_SIZE": _RESPONSE_CHUNKS,
    "BATCH_SIZE_GROWTH_FACTOR": _RESPONSE_CHUNKS,
    "DEFAULT_MIN_BATCH_SIZE": _RESPONSE_CHUNKS,
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": _RESPONSE_CHUNKS,
    "RAW_OPENAI_OUTPUT": "streams through RunPod's OpenAI gateway are always SSE text",
    "OPENAI_RESPONSE_ROLE": "the role of an answer is always assistant",
    "TOKENIZER": _CHECKPOINT,
    "TOKENIZER_NAME": _CHECKPOINT,
    "TOKENIZER_REVISION": _CHECKPOINT,
    "CUSTOM_CHAT_TEMPLATE": _CHECKPOINT,
    "TRUST_REMOTE_CODE": "code in a checkpoint is never run",
    "DISABLE_LOG_REQUESTS": "requests are never logged",
    "DISABLE_LOG_STATS": "statistics are not logged; GET /metrics has them",
    "ENABLE_AUTO_TOOL_CHOICE": _TOOLS,
    "TOOL_CALL_PARSER": _TOOLS,
    "TENSOR_PARALLEL_SIZE": _ONE_GPU,
    "PIPELINE_PARALLEL_SIZE": _ONE_GPU,
    "VLLM_STARTUP_TIMEOUT": "a load has no time limit; waiting jobs get its progress",
    "ENFORCE_EAGER": "torch.compile is not used",
    "LOAD_FORMAT": "the checkpoint's files say which format it has",
}
"""Names of RunPod's vLLM worker that are accepted and change nothing, and why."""


@cache
def familiar_names() -> dict[str, str]:
    """Every familiar variable and the setting that it sets, such as `engine.max_model_len`."""
    names = {}
    for section, model in SECTIONS.items():
        for field in model.model_fields:
            path = f"{section}.{field}"
            if path not in NOT_BY_RULE:
                names[_name_by_rule(section, field)] = path
    return names | EXTRA_NAMES


def _name_by_rule(section: str, field: str) -> str:
    return (field if "_" in field else f"{section}_{field}").upper()


def familiar_values(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The values of familiar variables as sections of settings. An empty value counts as unset."""
    found: dict[str, dict[str, str]] = {}
    for name, path in familiar_names().items():
        if value := environment.get(name):
            section, field = path.split(".")
            found.setdefault(section, {})[field] = value
    return found


def unused_names(environment: Mapping[str, str]) -> str | None:
    """One line that lists the variables in `UNUSED_NAMES` that are set; None if there are none."""
    reasons: dict[str, list[str]] = {}
    for name, reason in UNUSED_NAMES.items():
        if environment.get(name):
            reasons.setdefault(reason, []).append(name)
    if not reasons:
        return None
    listed = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"These variables are set and change nothing: {'; '.join(listed)}."
