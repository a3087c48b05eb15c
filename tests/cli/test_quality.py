"""`mixtral-serve quality`: its figures against transformers', torch's and bitsandbytes' own."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.cli.commands import main
from serve_app.cli.quality import _made, measure
from serve_app.cli.quality_scores import LogProbs, compare, perplexity
from serve_app.cli.quality_sides import BITSANDBYTES, FLOATS, SERVED, served
from serve_app.cli.quality_text import PROSE, cut
from serve_app.config.settings import Settings
from serve_app.loading.load import load
from serve_app.loading.load_log import LoadLog
from serve_app.model.checkpoint.convert import convert
from serve_app.model.quantization import Quantization
from serve_app.protocol.tokenizer import Tokenizer
from serve_app.start_plan.plan import plan_start
from serve_app.tiny import CHECKPOINT
from tests.model.quantized_oracle import round_model

TEXT = PROSE.read_text()[:1500]


def report_of(config: str, **arguments: Any) -> dict[str, Any]:
    chosen = Settings.from_yaml(f"configs/{config}.yaml")
    return measure(chosen, plan_start(chosen), [TEXT], **arguments)


def transformers_model() -> Any:
    """Returns the tiny model in float32."""
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def test_floats_served_are_the_floats_of_transformers() -> None:
    """Without 4 bits nothing is lost, also where accelerate keeps most weights on disk."""
    found = report_of("tiny", max_memory={"cpu": 4_000_000})
    sides = {side["name"]: side for side in found["sides"]}
    assert sides[FLOATS]["in_4_bits"] == "nothing; float32, offloaded"
    assert sides[SERVED]["in_4_bits"] == "nothing; float32"
    assert (sides[FLOATS]["share_in_4_bits"], sides[SERVED]["share_in_4_bits"]) == (0, 0)
    assert sides[SERVED]["perplexity"] == pytest.approx(sides[FLOATS]["perplexity"], rel=1e-4)
    pair = found["comparisons"][0]
    assert (pair["reference"], pair["side"]) == (FLOATS, SERVED)
    assert pair["kl_nats_per_token"] == pytest.approx(0, abs=1e-8)
    assert pair["top1_agreement"] == 1
    # The perplexity of transformers' own loss.
    ids = torch.tensor([Tokenizer(CHECKPOINT).encode(TEXT)])
    with torch.inference_mode():
        loss = float(transformers_model()(ids, labels=ids).loss)
    assert sides[FLOATS]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_each_side_says_what_it_has_in_4_bits() -> None:
    """Experts and attention here, attention alone in transformers; both differ from the floats."""
    found = report_of("tiny-nf4")
    floats, ours, theirs = found["sides"]
    assert ours["in_4_bits"].startswith("experts, attention in nf4, absmax bfloat16")
    assert theirs["in_4_bits"].startswith("q_proj, k_proj, v_proj, o_proj in nf4")
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(CHECKPOINT)
    count = {name: it.numel() for name, it in model.named_parameters()}
    attention = sum(n for name, n in count.items() if "_proj.weight" in name)
    experts = sum(n for name, n in count.items() if "experts" in name)
    total = sum(count.values())
    assert floats["share_in_4_bits"] == 0
    assert theirs["share_in_4_bits"] == pytest.approx(attention / total)
    assert ours["share_in_4_bits"] == pytest.approx((attention + experts) / total)
    pairs = [(pair["reference"], pair["side"]) for pair in found["comparisons"]]
    assert pairs == [(FLOATS, SERVED), (FLOATS, BITSANDBYTES), (BITSANDBYTES, SERVED)]
    for pair in found["comparisons"]:
        assert pair["kl_nats_per_token"] > 1e-4
        assert 0 < pair["top1_agreement"] < 1


def test_the_floats_are_found_beside_the_4_bit_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `model.cache_dir` the copy is served, and the comparison is with the original."""
    monkeypatch.setenv("MIXTRAL_MODEL__CACHE_DIR", str(tmp_path))
    first = report_of("tiny-nf4")
    assert list(tmp_path.iterdir())
    again = report_of("tiny-nf4")
    assert plan_start(Settings.from_yaml("configs/tiny-nf4.yaml")).checkpoint.form == "fused"
    assert again["comparisons"] == first["comparisons"]


def test_the_served_distributions_are_those_of_rounded_weights(tmp_path: Path) -> None:
    """Experts and attention rounded by bitsandbytes in transformers give the same distributions."""
    chosen = Settings.from_yaml("configs/tiny-nf4.yaml")
    loaded = load(chosen, LoadLog.resume(None), plan_start(chosen))
    windows = cut([TEXT, TEXT[::-1]], loaded.tokenizer, 300)  # several windows and chunks
    assert len(windows.windows) > 2
    side = served(loaded, False, windows, tmp_path / "served")
    oracle = transformers_model()
    round_model(oracle, Quantization("nf4", "bfloat16"))
    expected = LogProbs(tmp_path / "oracle", len(windows.targets), 768)
    for ids in windows.inputs:
        with torch.inference_mode():
            expected.add(oracle(torch.tensor([ids])).logits[0])
    assert side.log_probs is not None
    found = compare(expected, side.log_probs)
    assert found.kl_nats_per_token == pytest.approx(0, abs=1e-8)
    assert found.top1_agreement == 1


@pytest.mark.parametrize("absmax", ["bfloat16", "nested"])
def test_a_checkpoint_in_4_bits_has_no_floats_to_compare_with(
    absmax: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table and the JSON say so, and have the served model's perplexity."""
    convert(CHECKPOINT, tmp_path / "fused", Quantization("nf4", absmax))
    monkeypatch.setenv("MODEL_NAME", str(tmp_path / "fused"))
    text, out = tmp_path / "text", tmp_path / "q.json"
    text.write_text("It was a dark and stormy night.")
    assert main(["quality", "tiny-nf4", str(text), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    floats, ours, theirs = found["sides"]
    assert (floats["perplexity"], theirs["perplexity"], found["comparisons"]) == (None, None, [])
    assert "contains 4-bit weights only" in floats["in_4_bits"]
    assert "no experts in 4 bits" in theirs["in_4_bits"]
    printed = capsys.readouterr().out
    assert f"{FLOATS}: {floats['in_4_bits']}." in printed
    assert f"{ours['perplexity']:.4f}" in printed
    assert found["text"]["files"] == ["text"]


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 600), st.integers(2, 9))
def test_the_figures_are_torchs(seed: int, num_tokens: int, vocab_size: int) -> None:
    """Divergence is `F.kl_div`, perplexity the exponential of `F.cross_entropy`."""
    import tempfile

    numbers = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, num_tokens, vocab_size, generator=numbers)
    targets = torch.randint(vocab_size, (num_tokens,), generator=numbers)
    with tempfile.TemporaryDirectory() as folder:
        sides = []
        for name, logits in (("p", p), ("q", q)):
            side = LogProbs(Path(folder, name), num_tokens, vocab_size)
            for part in logits.split(100):
                side.add(part)
            sides.append(side)
        found = compare(*sides)
        loss = F.cross_entropy(p, targets)
        assert perplexity(sides[0], targets.tolist()) == pytest.approx(float(loss.exp()), rel=1e-4)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert found.kl_nats_per_token == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    assert found.top1_agreement == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).float().mean())
    )


def test_windows_predict_every_token_once() -> None:
    """Each token of each text is predicted in one window, each of which begins with BOS."""
    tokenizer = Tokenizer(CHECKPOINT)
    windows = cut([TEXT, "Hello"], tokenizer, 100)
    assert all(window[0] == tokenizer.bos_token_id for window in windows.windows)
    assert max(map(len, windows.windows)) == 100
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (TEXT, "Hello")]
    assert windows.targets == [*ids[0], *ids[1]]


def test_a_side_that_fails_says_why() -> None:
    """Its row has the error's first line; the other sides are printed."""

    def fails() -> Any:
        raise ValueError("Too large.\nA long explanation.")

    side = _made(FLOATS, fails)
    assert side.quantized == "not measured: ValueError: Too large."
    assert (side.log_probs, side.share_in_4_bits) == (None, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "too few tokens"), (b"\xff", "is not UTF-8"), (None, "cannot be read: No such file")],
)
def test_a_text_that_cannot_be_scored_is_one_sentence(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with exit code 1."""
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    assert main(["quality", "tiny", str(tmp_path / "text")]) == 1
    assert words in capsys.readouterr().err
