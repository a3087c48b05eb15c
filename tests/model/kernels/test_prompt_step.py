"""A GPU's step of prompts, its Triton kernels run by the interpreter, beside plain torch."""

from typing import Any

import pytest
import torch

from serve_app.model.kernels.triton import prompt_step
from serve_app.model.kernels.triton.prompt_step import PromptStep
from serve_app.model.kernels.unavailable import StepUnavailable
from serve_app.model.quantization import Quantization
from tests.model.kernels.test_gpu_step import CASES, cache_of, model_of


@pytest.fixture(autouse=True)
def _short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens in the trial: the interpreter takes a second for what a GPU does in 1 ms."""
    monkeypatch.setattr(prompt_step, "TRIED_CHUNKS", ((5, 20), (9, 9), (1, 1), (300, 900)))


@pytest.mark.parametrize(("quantization", "shape"), CASES.values(), ids=CASES)
def test_it_gives_the_models_logits(
    quantization: Quantization | None, shape: dict[str, Any]
) -> None:
    """Chunks of several sequences: logits equal plain torch's to float32's rounding."""
    torch.manual_seed(1)
    model = model_of(quantization, torch.float32, **shape)
    assert PromptStep(model, cache_of(model))._error() < 1e-5


def refusal(model: Any) -> str:
    with pytest.raises(StepUnavailable) as caught:
        PromptStep.verified(model, cache_of(model))
    return str(caught.value)


def test_in_16_bits_it_is_used_when_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes something else, or raises, is refused with a reason."""
    torch.manual_seed(1)
    model = model_of(Quantization("nf4", "bfloat16"), torch.float16)
    assert isinstance(PromptStep.verified(model, cache_of(model)), PromptStep)
    logits = PromptStep.logits
    for wrong in (1.1, float("nan")):
        monkeypatch.setattr(
            PromptStep, "logits", lambda self, rows, w=wrong: logits(self, rows) * w
        )
        assert "differ from plain torch" in refusal(model)
    monkeypatch.setattr(PromptStep, "logits", lambda self, rows: rows.nothing)
    assert "failed in their trial (AttributeError" in refusal(model)
