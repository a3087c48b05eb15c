"""`mixtral-serve check --load`: the report that a user can send back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.api import trial
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.convert import convert
from serve_app.model.linear import QuantizedLinear
from serve_app.model.quantization import Quantization
from serve_app.start_plan.plan import plan_start
from serve_app.tiny import CHECKPOINT


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 8 tokens: how many a speed is measured with is not what these tests are about."""
    monkeypatch.setattr(trial, "NUM_TOKENS", 8)


def run(config: str, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns the trial of `config` and the environment."""
    settings = Settings.from_yaml(config)
    return trial.run(settings, plan_start(settings), out, say)


def test_the_report_holds_what_we_would_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report has bytes, kernels, ten answers and three speeds, and no secret."""
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    lines: list[str] = []
    out = tmp_path / "report.json"
    run("configs/tiny-nf4.yaml", out, lines.append)
    report = json.loads(out.read_text())
    assert set(report["memory"]) == {"experts", "attention", "head", "other", "kv_cache"}
    assert [answer["text"] for answer in report["answers"]].count("") == 0
    assert len(report["answers"]) == 10
    assert all(report["tokens_per_s"][size] > 0 for size in ("1", "8", "32"))
    assert {kernel["kernel"] for kernel in report["kernels"]} == {
        "linear (torch)",
        "experts (torch)",
    }
    assert any("experts" in line for line in lines)
    assert "hf_sesame" not in out.read_text() + "".join(lines)


def test_a_model_without_a_chat_template_is_tried_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a chat template it asks for completions; it skips batches above `max_num_seqs`."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "base")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setenv("MODEL_NAME", str(checkpoint))
    monkeypatch.setenv("MIXTRAL_ENGINE__MAX_NUM_SEQS", "8")
    report = run("configs/tiny-nf4.yaml", tmp_path / "r.json", lambda _: None)
    assert len(report["answers"]) == 10
    assert set(report["tokens_per_s"]) == {"1", "8"}


def test_kernels_are_tried_in_the_form_that_memory_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint with nested absmax has bfloat16 in memory, which is what is tried."""
    convert(CHECKPOINT, tmp_path / "ours", Quantization("nf4", "nested"))
    monkeypatch.setenv("MODEL_NAME", str(tmp_path / "ours"))
    lines: list[str] = []
    report = run("configs/tiny-nf4.yaml", tmp_path / "r.json", lines.append)
    assert {kernel["storage"] for kernel in report["kernels"]} == {"nf4, bfloat16 absmax"}


def test_a_report_needs_a_folder(tmp_path: Path) -> None:
    """A wrong --out is an error before the model is loaded."""
    with pytest.raises(ConfigError, match="absent"):
        run("configs/tiny.yaml", tmp_path / "absent" / "r.json", print)
    with pytest.raises(ConfigError, match="/proc cannot be written"):
        run("configs/tiny.yaml", Path("/proc/r.json"), print)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    """A product that is wrong by a percent, or NaN, stops the trial before the model loads."""
    right = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: right(self, x) * factor)
    with pytest.raises(ModelLoadFailed, match="linear"):
        run("configs/tiny-nf4.yaml", tmp_path / "r.json", lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_the_torch_forms_are_within_tolerance(quant_type: str, dtype: torch.dtype) -> None:
    """Both sets of code values pass their own check, in either dtype."""
    from serve_app.model.kernels.kernel_check import relative_errors

    how = Quantization(quant_type, "bfloat16")  # type: ignore[arg-type]
    for error in relative_errors(how, dtype, torch.device("cpu")).values():
        assert error < trial.TOLERANCE[str(dtype).removeprefix("torch.")]
