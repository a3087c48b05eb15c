"""`config.json` of any Mixtral checkpoint, as transformers reads it."""

from typing import Any

import pytest

from serve_app.errors import ModelLoadFailed
from serve_app.model.config import MixtralConfig
from tests.model.checkpoint.full_size import CONFIG


def test_the_published_file_is_read() -> None:
    """Every field of the published configuration is read."""
    assert MixtralConfig.from_dict(CONFIG) == MixtralConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=frozenset({2}),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 64}, "head_dim", 64),
        ({"eos_token_id": [2, 7]}, "eos_token_ids", frozenset({2, 7})),
        ({"eos_token_id": None}, "eos_token_ids", frozenset()),
        ({"sliding_window": 4096}, "sliding_window", 4096),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
        ({"rope_theta": 1e4}, "rope_theta", 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"dtype": "float16", "torch_dtype": None}, "dtype", "float16"),
    ],
)
def test_every_way_to_write_a_value(changes: dict[str, Any], field: str, value: object) -> None:
    """Optional keys, null, lists and both places of rope theta are understood."""
    assert getattr(MixtralConfig.from_dict({**CONFIG, **changes}), field) == value


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"num_key_value_heads": 5}, "num_key_value_heads"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"intermediate_size": 4097}, "intermediate_size"),
        ({"head_dim": 63}, "head_dim"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": [2, True]}, "eos_token_id"),
        ({"eos_token_id": 32000}, "eos_token_id"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"bos_token_id": False}, "bos_token_id"),
        ({"bos_token_id": 32000}, "bos_token_id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, Any], key: str) -> None:
    """Another model or impossible numbers end in one sentence that names the key."""
    with pytest.raises(ModelLoadFailed, match=f"config.json: .*`{key}`") as caught:
        MixtralConfig.from_dict({**CONFIG, **changes})
    assert not caught.value.retry
