"""The environment variables of vLLM and RunPod, and the setting that each of them sets.

A setting has one such name by rule:

- A field of several words is its own name: `MAX_MODEL_LEN` sets `engine.max_model_len`.
- A field of one word needs its section: `MODEL_NAME` sets `model.name`. A bare `NAME`, `DEVICE`,
  `START` or `VOLUME` occurs in containers for other purposes, so it sets nothing.

The rule does not apply to `NOT_BY_RULE`. `EXTRA_NAMES` are names that do not follow the rule.
`VALUES` maps values. The functions take the environment as an argument; only `settings.py` reads
the real one.
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
    "RUNPOD_INIT_TIMEOUT": "runpod.init_timeout_s",
}
"""Names of RunPod and its vLLM worker that do not follow the rule, with their settings."""

NOT_BY_RULE = {
    "model.cache_dir": "other programs in a container read CACHE_DIR",
    "engine.num_threads": "other programs in a container read NUM_THREADS",
    "observability.log_format": "other programs in a container read LOG_FORMAT",
    "runpod.volume": "RunPod owns the names that begin with RUNPOD_",
    "runpod.init_timeout_s": "the platform reads RUNPOD_INIT_TIMEOUT alone",
    "runpod.start": "RunPod owns the names that begin with RUNPOD_",
}
"""Settings whose name by rule has another purpose, and that purpose. Only the `MIXTRAL_*` name sets
them."""

VALUES: dict[str, dict[str, str | None]] = {
    "QUANTIZATION": {"bitsandbytes": "nf4"},
    "DTYPE": {"half": "float16", "float": "float32"},
    "MAX_MODEL_LEN": {"auto": None},
    "MAX_NUM_BATCHED_TOKENS": {"0": None},
}
"""Values of RunPod's vLLM worker and the values of our settings; None leaves the default. Values
are compared in lower case: worker-vllm's form sends None for QUANTIZATION."""


@cache
def aliases() -> dict[str, str]:
    """Returns the setting, such as `engine.max_model_len`, that each alias sets."""
    names = {}
    for section, model in SECTIONS.items():
        for field in model.model_fields:
            path = f"{section}.{field}"
            if path not in NOT_BY_RULE:
                names[_name_by_rule(section, field)] = path
    return names | EXTRA_NAMES


def _name_by_rule(section: str, field: str) -> str:
    return (field if "_" in field else f"{section}_{field}").upper()


def alias_values(environment: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Returns the values of aliass as sections of settings. An empty value counts as
    unset."""
    sections: dict[str, dict[str, str]] = {}
    for name, path in aliases().items():
        if value := _value(environment, name):
            section, field = path.split(".")
            sections.setdefault(section, {})[field] = value
    return sections


def alias_source(environment: Mapping[str, str], path: str) -> str | None:
    """Returns the alias that gives the setting `path` its value, or None."""
    names = [name for name, sets in aliases().items() if sets == path]
    return next((name for name in reversed(names) if _value(environment, name)), None)


def _value(environment: Mapping[str, str], name: str) -> str | None:
    value = environment.get(name)
    if not value or name not in VALUES:
        return value
    normalized = value.strip().lower()
    return VALUES[name].get(normalized, normalized)
