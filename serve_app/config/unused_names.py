"""Environment variables of RunPod's vLLM worker that have no effect here, and the reasons.

Together with the names in `environment.py` these are all names in worker-vllm's documentation: its
README, docs/configuration.md and .runpod/hub.json of 2026-05 and 2026-08.
"""

from collections.abc import Mapping

_BY_REASON = {
    "a response chunk holds all text since the last one was sent": (
        *("DEFAULT_BATCH_SIZE", "MIN_BATCH_SIZE", "BATCH_SIZE_GROWTH_FACTOR"),
        *("DEFAULT_MIN_BATCH_SIZE", "DEFAULT_BATCH_SIZE_GROWTH_FACTOR", "STREAM_INTERVAL"),
    ),
    "streams through RunPod's OpenAI gateway are always SSE text": ("RAW_OPENAI_OUTPUT",),
    "the role of an answer is always assistant": ("OPENAI_RESPONSE_ROLE",),
    "the checkpoint's tokenizer is used": ("TOKENIZER", "TOKENIZER_NAME", "TOKENIZER_REVISION"),
    "there is one tokenizer, the fast one, in the server's process": (
        *("TOKENIZER_MODE", "TOKENIZER_POOL_SIZE", "TOKENIZER_POOL_TYPE"),
        *("TOKENIZER_POOL_EXTRA_CONFIG", "SKIP_TOKENIZER_INIT"),
    ),
    "a request that brings a chat template gets an error": ("TRUST_REQUEST_CHAT_TEMPLATE",),
    "code in a checkpoint is never run": ("TRUST_REMOTE_CODE",),
    "the checkpoint's files say which format they have": (
        *("LOAD_FORMAT", "MODEL_LOADER_EXTRA_CONFIG"),
    ),
    "the checkpoint's config.json decides": (
        *("ROPE_SCALING", "ROPE_THETA", "DISABLE_SLIDING_WINDOW"),
    ),
    "a download goes to the volume of BASE_PATH, or to HF_HOME where none is mounted": (
        "DOWNLOAD_DIR",
    ),
    "LoRA adapters are not supported": (
        *("ENABLE_LORA", "MAX_LORAS", "MAX_LORA_RANK", "LORA_EXTRA_VOCAB_SIZE", "LORA_DTYPE"),
        *("LONG_LORA_SCALING_FACTORS", "MAX_CPU_LORAS", "FULLY_SHARDED_LORAS", "LORA_MODULES"),
    ),
    "speculative decoding is not supported": (
        *("SPECULATIVE_CONFIG", "SPECULATIVE_METHOD", "SPECULATIVE_MODEL"),
        *("NUM_SPECULATIVE_TOKENS", "SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE"),
        *("SPECULATIVE_MAX_MODEL_LEN", "SPECULATIVE_DISABLE_BY_BATCH_SIZE"),
        *("NGRAM_PROMPT_LOOKUP_MAX", "NGRAM_PROMPT_LOOKUP_MIN", "NUM_LOOKAHEAD_SLOTS"),
    ),
    "structured outputs use llguidance, which is the only library here": (
        "GUIDED_DECODING_BACKEND",
    ),
    "tool calls are always on; the checkpoint's tokenizer decides their form": (
        *("ENABLE_AUTO_TOOL_CHOICE", "TOOL_CALL_PARSER"),
    ),
    "with `tool_choice: none` the tools are never in the prompt": (
        "EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE",
    ),
    "Mixtral does not reason apart from its answer": ("REASONING_PARSER",),
    "one process on one GPU holds the model": (
        *("TENSOR_PARALLEL_SIZE", "PIPELINE_PARALLEL_SIZE", "ENABLE_EXPERT_PARALLEL"),
        *("DISABLE_CUSTOM_ALL_REDUCE", "DISTRIBUTED_EXECUTOR_BACKEND", "WORKER_USE_RAY"),
        *("MAX_PARALLEL_LOADING_WORKERS", "RAY_WORKERS_USE_NSIGHT"),
    ),
    "MIXTRAL_MODEL__DEVICE chooses the device": ("DEVICE",),
    "the image's build of torch decides; the Dockerfile has a build argument for it": (
        "WORKER_CUDA_VERSION",
    ),
    "the libraries' versions are those of the image": ("TRANSFORMERS_VERSION",),
    "the KV cache has the model's dtype": ("KV_CACHE_DTYPE", "QUANTIZATION_PARAM_PATH"),
    "MIXTRAL_ENGINE__KV_CACHE_TOKENS sets the size of the KV cache": ("NUM_GPU_BLOCKS_OVERRIDE",),
    "a sequence that loses its KV blocks is computed again": (
        *("SWAP_SPACE", "PREEMPTION_MODE", "PREEMPTION_CHECK_PERIOD", "PREEMPTION_CPU_CAPACITY"),
    ),
    "the scheduler has one way to work: prefill chunks beside decodes, asynchronous on a GPU": (
        *("ENABLE_CHUNKED_PREFILL", "NUM_SCHEDULER_STEPS", "SCHEDULER_DELAY_FACTOR"),
        *("ASYNC_SCHEDULING", "USE_V2_BLOCK_MANAGER"),
    ),
    "the kernels are this server's own": (
        *("ATTENTION_BACKEND", "VLLM_ATTENTION_BACKEND", "VLLM_USE_DEEP_GEMM"),
    ),
    "a captured graph takes contexts of any length": (
        *("MAX_SEQ_LEN_TO_CAPTURE", "MAX_CONTEXT_LEN_TO_CAPTURE"),
    ),
    "graphs are captured for fixed batch sizes up to MAX_NUM_SEQS": (
        *("CUDA_GRAPH_SIZES", "COMPILATION_CONFIG"),
    ),
    "a request's own `seed` makes its sampling repeatable": ("SEED",),
    "a request may ask for 20 log probabilities of each token": ("MAX_LOGPROBS",),
    "answers are text; log probabilities name tokens by their text": (
        "RETURN_TOKENS_AS_TOKEN_IDS",
    ),
    "the usage always has the cached tokens of the prompt": ("ENABLE_PROMPT_TOKENS_DETAILS",),
    "a stream has its usage where the request asks for it with `stream_options`": (
        "ENABLE_FORCE_INCLUDE_USAGE",
    ),
    "prompts and answers are not logged": (
        *("DISABLE_LOG_REQUESTS", "ENABLE_LOG_REQUESTS", "DISABLE_LOGGING_REQUEST"),
        *("ENABLE_LOG_OUTPUTS", "MAX_LOG_LEN"),
    ),
    "the log has the stack of an internal error, and clients get its request id": (
        "LOG_ERROR_STACK",
    ),
    "statistics are not logged; GET /metrics has them": ("DISABLE_LOG_STATS",),
    "a load has no time limit; waiting jobs get its progress": ("VLLM_STARTUP_TIMEOUT",),
    "no server of vLLM runs here": ("VLLM_PORT", "VLLM_EXTRA_ARGS", "VLLM_CONFIG_FILE"),
    "API_KEYS has the keys that HTTP clients need": ("VLLM_API_KEY",),
}

UNUSED_NAMES = {name: reason for reason, names in _BY_REASON.items() for name in names}
"""Names that are accepted but have no effect, and the reason."""


def unused_names(environment: Mapping[str, str]) -> str | None:
    """Returns a line that lists the set variables in `UNUSED_NAMES`; None if there are none."""
    listed = []
    for reason, names in _BY_REASON.items():
        if set_names := [name for name in names if environment.get(name)]:
            listed.append(f"{', '.join(set_names)} ({reason})")
    return f"These variables are set and change nothing: {'; '.join(listed)}." if listed else None
