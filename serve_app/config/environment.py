"""The environment's names that users of other workers set: those that mean a setting of ours, and
those that nothing here needs.

Data and plain functions: `settings.py` alone reads the environment and hands it in.
"""

from collections.abc import Mapping

FAMILIAR = {
    "MODEL_NAME": "model.name",
    "MODEL_REVISION": "model.revision",
    "SERVED_MODEL_NAME": "model.served_model_name",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "model.served_model_name",
    "QUANTIZATION": "model.quantization",
    "DTYPE": "model.dtype",
    "HF_TOKEN": "model.hf_token",
    "MAX_MODEL_LEN": "engine.max_model_len",
    "MAX_NUM_SEQS": "engine.max_num_seqs",
    "MAX_NUM_BATCHED_TOKENS": "engine.max_num_batched_tokens",
    "BLOCK_SIZE": "engine.block_size",
    "GPU_MEMORY_UTILIZATION": "engine.gpu_memory_utilization",
    "ENABLE_PREFIX_CACHING": "engine.enable_prefix_caching",
    "API_KEYS": "api.keys",
    "REQUEST_TIMEOUT": "api.request_timeout_s",
    "MAX_CONCURRENCY": "runpod.max_concurrency",
    "BASE_PATH": "runpod.volume",
}
"""Names that RunPod users set, and the setting each stands for. `MIXTRAL_*` wins over these."""

_CHUNKS = "a chunk holds what came while the last one was posted"
_CHECKPOINT = "the checkpoint's own is used"
_ONE_GPU = "one GPU holds the model"
_TOOLS = "tool calls are not supported, and refused by name"

UNNEEDED = {
    "DEFAULT_BATCH_SIZE": _CHUNKS,
    "MIN_BATCH_SIZE": _CHUNKS,
    "BATCH_SIZE_GROWTH_FACTOR": _CHUNKS,
    "DEFAULT_MIN_BATCH_SIZE": _CHUNKS,
    "DEFAULT_BATCH_SIZE_GROWTH_FACTOR": _CHUNKS,
    "RAW_OPENAI_OUTPUT": "the gateway's streams are SSE text in any case",
    "OPENAI_RESPONSE_ROLE": "answers are the assistant's",
    "TOKENIZER": _CHECKPOINT,
    "TOKENIZER_NAME": _CHECKPOINT,
    "TOKENIZER_REVISION": _CHECKPOINT,
    "CUSTOM_CHAT_TEMPLATE": _CHECKPOINT,
    "TRUST_REMOTE_CODE": "no code of a checkpoint is run",
    "DISABLE_LOG_REQUESTS": "requests are never logged",
    "DISABLE_LOG_STATS": "statistics are not logged",
    "ENABLE_AUTO_TOOL_CHOICE": _TOOLS,
    "TOOL_CALL_PARSER": _TOOLS,
    "TENSOR_PARALLEL_SIZE": _ONE_GPU,
    "PIPELINE_PARALLEL_SIZE": _ONE_GPU,
    "VLLM_STARTUP_TIMEOUT": "waiting jobs hear how the load goes, however long it takes",
    "ENFORCE_EAGER": "nothing is compiled",
    "LOAD_FORMAT": "the form of a checkpoint is read from its files",
}
"""Names of older workers that are accepted and change nothing, and why."""


def familiar(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What the names in `FAMILIAR` say, as sections of settings; an empty value is none."""
    found: dict[str, dict[str, str]] = {}
    for name, path in FAMILIAR.items():
        if value := environment.get(name):
            section, key = path.split(".")
            found.setdefault(section, {})[key] = value
    return found


def unneeded(environment: Mapping[str, str]) -> str | None:
    """One line about the names in `UNNEEDED` that are set; None where none is."""
    reasons: dict[str, list[str]] = {}
    for name, reason in UNNEEDED.items():
        if environment.get(name):
            reasons.setdefault(reason, []).append(name)
    if not reasons:
        return None
    told = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"Set, but not needed here: {'; '.join(told)}."
