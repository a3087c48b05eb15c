"""The storage form of a checkpoint's weights is read from its config.json."""

from pathlib import Path
from typing import Any

import pytest

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import Checkpoint
from serve_app.model.checkpoint.form import stored_form
from tests.model.checkpoint.full_size import CONFIG


@pytest.mark.parametrize(
    ("stored", "form"),
    [
        (None, "float"),
        ({}, "float"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "mixtral-serve"}, "fused"),
    ],
)
def test_the_form_of_the_weights_is_read(stored: dict[str, Any] | None, form: str) -> None:
    """Both names that transformers has given to 4 bits are known, and our own format's."""
    assert stored_form({"quantization_config": stored}) == form


def test_the_quantization_that_cannot_be_read_is_named() -> None:
    """The sentence says which one it is."""
    with pytest.raises(ModelLoadFailed, match="'awq'"):
        stored_form({"quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(ModelLoadFailed, match="not in 4 bits"):
        stored_form({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})


@pytest.mark.parametrize(
    "stored",
    [{"load_in_8bit": True}, {"quant_method": "gptq"}, ["nf4"]],
    ids=["8bit", "gptq", "list"],
)
def test_a_checkpoint_in_another_form_is_refused(stored: Any) -> None:
    """The refusal names the key of config.json and is final: a retry would not help."""
    with pytest.raises(ModelLoadFailed, match=r"config.json: .*`quantization_config`") as caught:
        Checkpoint.from_config(Path("mixtral"), {**CONFIG, "quantization_config": stored})
    assert not caught.value.retry
