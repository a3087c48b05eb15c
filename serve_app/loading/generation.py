"""Generation: the stop tokens and the sampling defaults of a checkpoint.

`read_generation` reads the files that transformers and vLLM read, in the same way.
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
"""Keys of generation_config.json that vLLM uses, and the corresponding request fields."""


@dataclass(frozen=True, slots=True)
class Generation:
    """The stop tokens, and the defaults for sampling fields that a request does not set."""

    eos_token_ids: frozenset[int]
    """Token ids that end an answer."""
    defaults: Mapping[str, float]
    """Defaults of a request's sampling fields, by name. `max_tokens` is also an upper limit."""

    @property
    def notes(self) -> list[str]:
        """Notes for users, one phrase each."""
        notes = []
        if not self.eos_token_ids:
            notes.append(
                f"no eos token is known: config.json and {FILE} have no `eos_token_id`, and the "
                "tokenizer has no `eos_token`. Answers end only at `max_tokens` or `stop`"
            )
        if self.defaults:
            values = ", ".join(f"{name} {value:g}" for name, value in self.defaults.items())
            notes.append(f"sampling defaults of {FILE}: {values}")
        return notes


def read_generation(
    checkpoint: Checkpoint, tokenizer: Tokenizer, use: Literal["auto", "vllm"]
) -> Generation:
    """Reads config.json, generation_config.json and the tokenizer's `eos_token`.

    Every end token in one of the three ends an answer. With `use` "auto" the sampling defaults of
    generation_config.json are used; with "vllm" they are ignored, as with vLLM's
    `--generation-config vllm`. Raises `ModelLoadFailed` if generation_config.json has an impossible
    value.
    """
    config, file = checkpoint.config, checkpoint.path / FILE
    document = read_json(file) if file.exists() else {}
    ends = config.eos_token_ids | eos_token_ids(document, str(file), config.vocab_size)
    eos = tokenizer.eos_token_id
    if eos is not None and eos < config.vocab_size:
        ends |= {eos}
    return Generation(ends, _defaults(document, file) if use == "auto" else {})


def _defaults(document: Mapping[str, Any], file: Path) -> dict[str, float]:
    fields = {
        field: document[key] for key, field in FIELDS.items() if document.get(key) is not None
    }
    try:
        values = Sampling.read(fields)
    except InvalidRequest as error:
        raise ModelLoadFailed(
            f"{file}: {error.message.rstrip('.')}; correct the file, or set "
            "`model.generation_config` to vllm."
        ) from None
    return {field: getattr(values, field) for field in fields}
