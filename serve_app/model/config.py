"""The sizes of a Mixtral, read from the config.json of any Mixtral checkpoint.

Fields have the names of transformers' `MixtralConfig`. `from_dict` refuses variants that our
forward pass does not compute.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.errors import ModelLoadFailed


@dataclass(frozen=True)
class MixtralConfig:
    """The sizes and constants of a model."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    """out_features of an expert's gate and up projections."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    """Number of experts that the router chooses for each token."""
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    """Number of tokens that a token attends to, including itself; None means all."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    """Whether the embedding matrix is also the lm_head."""
    bos_token_id: int | None
    eos_token_ids: frozenset[int]
    dtype: str
    """dtype of the weights in the files, by its name in config.json ("bfloat16")."""

    @property
    def q_size(self) -> int:
        """out_features of the query projection."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """out_features of the key projection, and of the value projection."""
        return self.num_key_value_heads * self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Number of values of one token in the KV cache: keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.kv_size

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "MixtralConfig":
        """Reads a parsed `config.json`.

        Raises a `ModelLoadFailed` that names the key if the model is not a Mixtral, if a value is
        missing or invalid, or if it requires arithmetic that is not implemented.
        """
        _require_mixtral(document)
        heads = _positive(document, "num_attention_heads")
        hidden = _positive(document, "hidden_size")
        vocab_size = _positive(document, "vocab_size")
        config = cls(
            num_hidden_layers=_positive(document, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_positive(document, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=_positive(document, "num_key_value_heads", default=heads),
            head_dim=_positive(document, "head_dim", default=hidden // heads),
            num_local_experts=_positive(document, "num_local_experts"),
            num_experts_per_tok=_positive(document, "num_experts_per_tok"),
            vocab_size=vocab_size,
            rms_norm_eps=_number(document, "rms_norm_eps", default=1e-5),
            rope_theta=_rope_theta(document),
            sliding_window=_window(document),
            max_position_embeddings=_positive(document, "max_position_embeddings"),
            tie_word_embeddings=bool(document.get("tie_word_embeddings", False)),
            bos_token_id=_bos(document, vocab_size),
            eos_token_ids=eos_token_ids(document, "config.json", vocab_size),
            dtype=str(document.get("dtype") or document.get("torch_dtype") or "float32"),
        )
        config._require_consistent()
        return config

    def _require_consistent(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelLoadFailed(
                f"config.json: `num_attention_heads` ({self.num_attention_heads}) must be a "
                f"multiple of `num_key_value_heads` ({self.num_key_value_heads})."
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ModelLoadFailed(
                f"config.json: `num_experts_per_tok` ({self.num_experts_per_tok}) is more than "
                f"`num_local_experts` ({self.num_local_experts})."
            )
        for key in ("hidden_size", "intermediate_size"):
            if (
                getattr(self, key) % 8
            ):  # torch's grouped matrix products need rows of whole 16 bytes
                raise ModelLoadFailed(
                    f"config.json: `{key}` ({getattr(self, key)}) must be a multiple of 8."
                )
        if self.head_dim % 2:
            raise ModelLoadFailed(f"config.json: `head_dim` ({self.head_dim}) must be even.")


def _require_mixtral(document: Mapping[str, Any]) -> None:
    kind = document.get("model_type")
    if kind != "mixtral":
        raise ModelLoadFailed(
            f"config.json: `model_type` is {kind!r}, and only Mixtral checkpoints can be served."
        )
    if (activation := document.get("hidden_act", "silu")) != "silu":
        raise ModelLoadFailed(
            f"config.json: `hidden_act` is {activation!r}, and only 'silu' is implemented."
        )


def _rope_theta(document: Mapping[str, Any]) -> float:
    # transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
    for key in ("rope_parameters", "rope_scaling"):
        rope = document.get(key) or {}
        if not isinstance(rope, Mapping):
            raise ModelLoadFailed(f"config.json: `{key}` must be an object, got {rope!r}.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ModelLoadFailed(
                f"config.json: `{key}` asks for rope type {kind!r}, "
                "and only the unscaled 'default' is implemented."
            )
    rope = document.get("rope_parameters") or {}
    return _number({**document, **rope}, "rope_theta", default=1e6)


def _window(document: Mapping[str, Any]) -> int | None:
    return None if document.get("sliding_window") is None else _positive(document, "sliding_window")


def eos_token_ids(document: Mapping[str, Any], file: str, vocab_size: int) -> frozenset[int]:
    """Returns the `eos_token_id` of config.json or generation_config.json: null, an id, or a list
    of ids.

    Raises `ModelLoadFailed`, naming `file`, for anything else.
    """
    value = document.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_token_id(token_id, vocab_size) for token_id in ids):
        raise ModelLoadFailed(
            f"{file}: `eos_token_id` must be a token id below `vocab_size` ({vocab_size}) or a "
            f"list of them, got {value!r}."
        )
    return frozenset(ids)


def _bos(document: Mapping[str, Any], vocab_size: int) -> int | None:
    value: int | None = document.get("bos_token_id")
    if value is not None and not _is_token_id(value, vocab_size):
        raise ModelLoadFailed(
            f"config.json: `bos_token_id` must be a token id below `vocab_size` ({vocab_size}), "
            f"got {value!r}."
        )
    return value


def _is_token_id(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _positive(document: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = document.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ModelLoadFailed(f"config.json: `{key}` is missing.")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelLoadFailed(f"config.json: `{key}` must be a positive integer, got {value!r}.")
    return value


def _number(document: Mapping[str, Any], key: str, default: float) -> float:
    value = document.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelLoadFailed(f"config.json: `{key}` must be a positive number, got {value!r}.")
    return float(value)
