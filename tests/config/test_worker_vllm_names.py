"""Every variable that RunPod's vLLM worker documents is used, or answered in the log.

The names are those of worker-vllm's docs/configuration.md of 2026-05-27 (commit 9edc571) and of its
.runpod/hub.json of 2026-08-20 (commit 7a92503): 102 in all.
"""

import os
import re
import subprocess
import sys
from typing import Any

import pytest

from serve_app.cold_start.check import check
from serve_app.config.settings import ConfigError, Settings, unused_names
from serve_app.config.unused_names import UNUSED_NAMES
from serve_app.errors import ModelLoadFailed

TINY = "configs/tiny.yaml"

USED: dict[str, list[tuple[str, str, Any]]] = {
    "MODEL_NAME": [("a/b", "model.name", "a/b")],
    "MODEL_REVISION": [("main", "model.revision", "main")],
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": [("m", "model.served_model_name", "m")],
    "QUANTIZATION": [
        ("bitsandbytes", "model.quantization", "nf4"),
        ("None", "model.quantization", "none"),
        ("nf4", "model.quantization", "nf4"),
    ],
    "DTYPE": [
        ("half", "model.dtype", "float16"),
        ("float", "model.dtype", "float32"),
        ("bfloat16", "model.dtype", "bfloat16"),
        ("auto", "model.dtype", "auto"),
    ],
    "MAX_MODEL_LEN": [
        ("4096", "engine.max_model_len", 4096),
        ("auto", "engine.max_model_len", Settings.from_yaml(TINY).engine.max_model_len),
    ],
    "MAX_NUM_SEQS": [("256", "engine.max_num_seqs", 256)],
    "MAX_NUM_BATCHED_TOKENS": [
        ("1024", "engine.max_num_batched_tokens", 1024),
        ("0", "engine.max_num_batched_tokens", None),
    ],
    "BLOCK_SIZE": [("32", "engine.block_size", 32)],
    "GPU_MEMORY_UTILIZATION": [("0.95", "engine.gpu_memory_utilization", 0.95)],
    "ENABLE_PREFIX_CACHING": [
        ("False", "engine.enable_prefix_caching", False),
        ("0", "engine.enable_prefix_caching", False),
    ],
    "ENFORCE_EAGER": [
        ("true", "engine.enforce_eager", True),
        ("1", "engine.enforce_eager", True),
        ("False", "engine.enforce_eager", False),
    ],
    "CUSTOM_CHAT_TEMPLATE": [
        ("{{ messages }}", "model.custom_chat_template", "{{ messages }}"),
        ("/a/template.jinja", "model.custom_chat_template", "/a/template.jinja"),
    ],
    "MAX_CONCURRENCY": [("30", "runpod.max_concurrency", 30)],
    "BASE_PATH": [("/vol", "runpod.volume", "/vol")],
}
"""Names with a value and the setting that gets a value from it."""

READ_BY_LIBRARIES = {"HF_TOKEN", "PYTORCH_ALLOC_CONF"}
"""Tested below, each in its own way."""

ANSWERED = """
ASYNC_SCHEDULING ATTENTION_BACKEND DEFAULT_BATCH_SIZE_GROWTH_FACTOR
DEFAULT_BATCH_SIZE DEFAULT_MIN_BATCH_SIZE DEVICE DISABLE_CUSTOM_ALL_REDUCE
DISABLE_LOGGING_REQUEST DISABLE_LOG_REQUESTS DISABLE_LOG_STATS DISABLE_SLIDING_WINDOW
DISTRIBUTED_EXECUTOR_BACKEND DOWNLOAD_DIR ENABLE_AUTO_TOOL_CHOICE ENABLE_CHUNKED_PREFILL
ENABLE_EXPERT_PARALLEL ENABLE_FORCE_INCLUDE_USAGE ENABLE_LOG_OUTPUTS ENABLE_LOG_REQUESTS
ENABLE_LORA ENABLE_PROMPT_TOKENS_DETAILS EXCLUDE_TOOLS_WHEN_TOOL_CHOICE_NONE
FULLY_SHARDED_LORAS GUIDED_DECODING_BACKEND KV_CACHE_DTYPE LOAD_FORMAT LOG_ERROR_STACK
LONG_LORA_SCALING_FACTORS LORA_DTYPE LORA_EXTRA_VOCAB_SIZE LORA_MODULES
MAX_CONTEXT_LEN_TO_CAPTURE MAX_CPU_LORAS MAX_LOGPROBS MAX_LOG_LEN MAX_LORAS MAX_LORA_RANK
MAX_PARALLEL_LOADING_WORKERS MAX_SEQ_LEN_TO_CAPTURE MODEL_LOADER_EXTRA_CONFIG
NGRAM_PROMPT_LOOKUP_MAX NGRAM_PROMPT_LOOKUP_MIN NUM_GPU_BLOCKS_OVERRIDE NUM_LOOKAHEAD_SLOTS
NUM_SCHEDULER_STEPS NUM_SPECULATIVE_TOKENS OPENAI_RESPONSE_ROLE PIPELINE_PARALLEL_SIZE
PREEMPTION_CHECK_PERIOD PREEMPTION_CPU_CAPACITY PREEMPTION_MODE QUANTIZATION_PARAM_PATH
RAW_OPENAI_OUTPUT RAY_WORKERS_USE_NSIGHT REASONING_PARSER RETURN_TOKENS_AS_TOKEN_IDS
ROPE_SCALING ROPE_THETA SCHEDULER_DELAY_FACTOR SEED SKIP_TOKENIZER_INIT SPECULATIVE_CONFIG
SPECULATIVE_DISABLE_BY_BATCH_SIZE SPECULATIVE_DRAFT_TENSOR_PARALLEL_SIZE
SPECULATIVE_MAX_MODEL_LEN SPECULATIVE_METHOD SPECULATIVE_MODEL STREAM_INTERVAL SWAP_SPACE
TENSOR_PARALLEL_SIZE TOKENIZER_MODE TOKENIZER_NAME TOKENIZER_POOL_EXTRA_CONFIG
TOKENIZER_POOL_SIZE TOKENIZER_POOL_TYPE TOKENIZER_REVISION TOKENIZER TOOL_CALL_PARSER
TRUST_REMOTE_CODE TRUST_REQUEST_CHAT_TEMPLATE USE_V2_BLOCK_MANAGER VLLM_ATTENTION_BACKEND
VLLM_USE_DEEP_GEMM WORKER_CUDA_VERSION WORKER_USE_RAY
""".split()
"""Names that change nothing. One log line names them."""

PRESENT = "REQUEST_TIMEOUT VLLM_PORT VLLM_STARTUP_TIMEOUT VLLM_EXTRA_ARGS VLLM_CONFIG_FILE".split()
"""Names that were new in docs/configuration.md of 2026-08."""


def value_of(path: str) -> Any:
    section, field = path.split(".")
    return getattr(getattr(Settings.from_yaml(TINY), section), field)


@pytest.mark.parametrize(
    ("name", "value", "path", "expected"),
    [(name, *case) for name, cases in USED.items() for case in cases],
)
def test_a_name_that_is_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, path: str, expected: Any
) -> None:
    """The variable sets the setting that means the same, and is not in the log's line."""
    monkeypatch.setenv(name, value)
    assert value_of(path) == expected
    assert unused_names() is None


def test_the_token_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_TOKEN is the token for the hub."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert value_of("model.hf_token").get_secret_value() == "hf_secret"


LOAD = """
from serve_app.config.settings import Settings
from serve_app.errors import ModelLoadFailed
from serve_app.loading.load import load
from serve_app.loading.load_log import LoadLog
try:
    load(Settings(model={"name": "/missing"}), LoadLog(None))
except ModelLoadFailed:
    import torch
    print(torch._C._accelerator_getAllocatorSettings())
"""


@pytest.mark.parametrize("name", [None, "PYTORCH_CUDA_ALLOC_CONF"])
def test_torch_grows_segments_unless_the_user_says_otherwise(name: str | None) -> None:
    """In any way of starting, torch has the server's allocator settings after the beginning of a
    load, or those of the user's variable."""
    wanted = "expandable_segments:True" if name is None else "max_split_size_mb:64"
    variables = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    if name is not None:
        variables[name] = wanted
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == wanted


@pytest.mark.parametrize("name", [*ANSWERED, *UNUSED_NAMES])
def test_a_name_that_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One line names the variable with its reason, and no setting changes."""
    expected = Settings.from_yaml(TINY)
    monkeypatch.setenv(name, "1")
    assert Settings.from_yaml(TINY) == expected
    reason = UNUSED_NAMES[name]
    assert unused_names() == f"These variables are set and change nothing: {name} ({reason})."


def test_the_line_is_in_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them together are one line of the check, which every start logs."""
    for name in ANSWERED:
        monkeypatch.setenv(name, "1")
    (line,) = [line for line in check(TINY).lines if "change nothing" in line]
    assert "\n" not in line
    assert set(re.findall(r"\b[A-Z][A-Z0-9_]{3,}\b", line)) >= set(ANSWERED)


def test_all_102_names_are_here() -> None:
    """No name is in two groups, and none is missing."""
    names = [*USED, *READ_BY_LIBRARIES, *ANSWERED]
    assert len(names) == len(set(names)) == 102
    assert set(PRESENT) <= UNUSED_NAMES.keys() | {"REQUEST_TIMEOUT"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QUANTIZATION", "awq"),
        ("DTYPE", "fp8"),
        ("MAX_MODEL_LEN", "long"),
        ("ENFORCE_EAGER", "perhaps"),
        ("OPENAI_SERVED_MODEL_NAME_OVERRIDE", ","),
        ("MIXTRAL_ENGINE__BLOCK_SIZE", "many"),
        ("MAX_NUM_SEQS", "0"),
    ],
)
def test_an_error_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The error for an invalid value names its variable."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        Settings.from_yaml(TINY)


@pytest.mark.parametrize(
    ("name", "value"), [("MODEL_NAME", "no name"), ("MAX_MODEL_LEN", "1000000")]
)
def test_a_failed_check_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A setting in the sentence of a failed check is followed by the variable that sets it."""
    monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, ModelLoadFailed), match=rf"\(set by {name}\)"):
        check(TINY)
