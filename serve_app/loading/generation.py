"""Reads how a checkpoint's answers are generated: where they end, and the sampling defaults.

Transformers and vLLM read the same files in the same way, see `read_generation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve_app.errors import InvalidRequest, ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.shards import read_json
from serve_app.model.config import eos_token_ids
from serve_app.protocol.fields import Sampling
from serve_app.protocol.tokenizer import Tokenizer

FILE = "generation_config.json"
FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of generation_config.json that vLLM applies, and the request's fields for them."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What holds for answers where a request does not say it."""

    eos_token_ids: frozenset[int]
    """Token ids that end an answer."""
    defaults: Mapping[str, float]
    """Sampling fields of a request, by name. `max_tokens` is an upper limit too."""

    @property
    def notes(self) -> list[str]:
        """What users should know about it, a phrase each."""
        notes = []
        if not self.eos_token_ids:
            notes.append(
                f"no end of an answer is known: config.json and {FILE} have no `eos_token_id` and "
                "the tokenizer no `eos_token`, so answers end at `max_tokens` or `stop` alone"
            )
        if self.defaults:
            values = ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
            notes.append(f"sampling defaults of {FILE}: {values}")
        return notes


def read_generation(
    checkpoint: Checkpoint, tokenizer: Tokenizer, use: Literal["auto", "vllm"]
) -> Generation:
    """Reads config.json, generation_config.json and the tokenizer's `eos_token`.

    An answer ends with each token that one of them names. With `use` "auto" the sampling defaults
    of generation_config.json hold, with "vllm" they do not, as with vLLM's `--generation-config`.
    Raises `ModelLoadFailed` if generation_config.json has an impossible value.
    """
    config, file = checkpoint.config, checkpoint.path / FILE
    document = read_json(file) if file.exists() else {}
    ends = config.eos_token_ids | eos_token_ids(document, str(file), config.vocab_size)
    eos = tokenizer.eos_token_id
    if eos is not None and eos < config.vocab_size:
        ends |= {eos}
    return Generation(ends, _defaults(document, file) if use == "auto" else {})


def _defaults(document: Mapping[str, Any], file: Path) -> dict[str, float]:
    given = {field: document[key] for key, field in FIELDS.items() if document.get(key) is not None}
    try:
        values = Sampling.read(given)
    except InvalidRequest as error:
        raise ModelLoadFailed(
            f"{file}: {error.message.rstrip('.')}; mend it, or set `model.generation_config` to "
            "vllm."
        ) from None
    return {field: getattr(values, field) for field in given}
