"""The benchmark of a GPU box, at toy sizes on a CPU."""

import json
from pathlib import Path

import pytest

from benchmarks import box

pytestmark = pytest.mark.ray


def test_it_serves_a_synthetic_checkpoint_and_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document has the phases of the load beside a plain read, and for each number of streams
    and each prompt what the server took beside the engine."""
    monkeypatch.setattr(box, "ANSWER", 32)
    file = tmp_path / "box.json"
    options = ["--layers", "1", "--tiny", "--streams", "1", "2", "--save", str(file)]
    assert box.main([str(tmp_path / "box"), *options]) == 0
    document = json.loads(file.read_text())
    start, engine = document["start"], document["engine"]
    assert {"process", "ray", "replica", "read", "first token"} <= start["phases"].keys()
    assert 0 < start["phases"]["ready"] <= start["first_answer_s"] + 0.1
    weights = (tmp_path / "box" / "tiny-1-layers").glob("*.safetensors")
    assert start["gb"] == round(sum(it.stat().st_size for it in weights) / 1e9, 3)
    assert start["plain_read_s"] > 0
    assert [row["streams"] for row in document["streams"]] == [1, 2]
    for row in document["streams"]:
        assert (row["errors"], row["requests"], row["prompt_tokens"]) == (0, 4, 40)
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / row["wall_s"], rel=0.01)
        assert row["ms_per_token"] > 0
    sampled = [row for row in engine["decode"] if row["temperature"] == 0.7]
    assert [row["engine_tokens_per_s"] for row in document["streams"]] == [
        row["tokens_per_s"] for row in sampled
    ]
    alone = {
        row["tokens"]: row["first_token_ms"] for row in engine["prompts"] if not row["streams"]
    }
    assert {row["tokens"]: row["engine_ms"] for row in document["prompts"]} == alone
    assert all(row["first_token_ms"] > 0 for row in document["prompts"])
