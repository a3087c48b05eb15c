"""The benchmarks' arithmetic: lengths, prompts, percentiles, goodput, medians, ratios, targets."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from benchmarks.comparison import (
    FIGURES,
    TARGETS,
    Key,
    figures,
    likeness,
    medians,
    ratios,
    table,
    targets,
)
from benchmarks.latency import Objective, summarize
from benchmarks.load import Outcome
from benchmarks.plot import plot
from benchmarks.prompts import Lengths, Prompts
from benchmarks.report import publish


@pytest.mark.parametrize("text", ["0", "9:3", "lognormal:64", "x", "-1", "1:2:3"])
def test_other_lengths_are_refused(text: str) -> None:
    """Any other form raises an error that contains it."""
    with pytest.raises(ValueError, match=text):
        Lengths.parse(text)


def test_lengths_have_their_distribution() -> None:
    """Fixed, uniform between two ends, and lognormal about its median."""
    random = np.random.default_rng(0)
    assert {Lengths.parse("64").draw(random) for _ in range(9)} == {64}
    assert {Lengths.parse("3:5").draw(random) for _ in range(99)} == {3, 4, 5}
    drawn = [Lengths.parse("lognormal:100:0.5").draw(random) for _ in range(2000)]
    assert median(drawn) == pytest.approx(100, rel=0.1)
    assert max(drawn) <= 800


def test_prompts_share_what_was_asked() -> None:
    """Nine of ten words are common to all prompts, and the same seed draws the same again."""
    prompts = Prompts(Lengths.parse("100"), Lengths.parse("1:9"), shared=0.9, seed=5)
    first, second = (prompts.draw(number)[0].split() for number in (1, 2))
    assert first[:90] == second[:90]
    assert first[90:] != second[90:]
    assert prompts.draw(1) == prompts.draw(1)
    alone = Prompts(Lengths.parse("100"), Lengths.parse("9"))
    assert alone.draw(1)[0].split()[:5] != alone.draw(2)[0].split()[:5]


def outcome(sent: float, *arrivals: float, error: str | None = None) -> Outcome:
    return Outcome(sent, list(arrivals), num_tokens=len(arrivals), error=error)


def test_goodput_counts_answers_that_meet_the_objective() -> None:
    """Late first texts, slow tokens and errors do not count."""
    outcomes = [
        outcome(0, 0.1, 0.2, 0.3),
        outcome(0, 0.9, 1.0),  # its first token is late
        outcome(1, 1.1, 1.9),  # 800 ms a token
        outcome(1, 1.2, error="status 500"),
    ]
    found = summarize(outcomes, 2.0, Objective(ttft_ms=500, inter_token_ms=200))
    assert found["goodput"] == {"requests_per_s": 0.5, "tokens_per_s": 1.5, "share": 0.25}
    assert (found["errors"], found["error_kinds"]) == (1, {"status 500": 1})
    assert found["tokens_per_s"] == 3.5
    assert found["ttft_ms"]["p50"] == 100.0
    assert "goodput" not in summarize(outcomes, 2.0)


def level(tokens: float, first: float, errors: int = 0) -> dict[str, Any]:
    times = {"p50": first, "p95": first, "p99": 2 * first}
    return {
        "tokens_per_s": tokens,
        "ttft_ms": times,
        "inter_token_ms": {},
        "end_to_end_ms": times,
        "errors": errors,
    }


def rounds(*levels: dict[str, Any]) -> dict[Key, float]:
    """Returns the compared figures of the medians of rounds with one case each."""
    return figures(medians([{"short": {"1 at once": level}} for level in levels]))


def key(figure: str) -> Key:
    return Key("short", "1 at once", figure)


def test_medians_ratios_and_targets() -> None:
    """Medians are over rounds, ratios are ours to theirs, and each target is compared with its
    ratio."""
    levels = [{1: level(300, 10)}, {1: level(100, 30, errors=1)}, {1: level(200, 20)}]
    assert medians(levels)[1]["errors"] == 1
    ours = rounds(level(300, 10), level(100, 30), level(200, 20))
    assert ours[key("tokens/s")] == 200
    assert ours[key("first token p99, ms")] == 40
    theirs = {"vllm": rounds(level(100, 10)), "llama.cpp": rounds(level(400, 10))}
    compared = {name: ratios(ours, each) for name, each in theirs.items()}
    assert compared["vllm"][key("tokens/s")] == 2.0
    met = {(t["peer"], t["figure"]): t["met"] for t in targets(ours, compared)}
    assert met == {
        ("vllm", "tokens/s"): True,
        ("vllm", "first token p99, ms"): False,
        ("llama.cpp", "tokens/s"): False,
    }


def test_a_target_without_a_peer_bounds_our_own_figure() -> None:
    """The last turn's first token is compared with twice the first turn's, case by case."""
    conversations = {
        f"{count} conversations": {"tokens_per_s": 1.0, "last_turn_to_first": ratio}
        for count, ratio in ((1, 1.9), (16, 2.1))
    }
    judged = targets(figures({"conversations": conversations}), {})
    assert [(t["case"], t["at_most"], t["found"], t["met"]) for t in judged] == [
        ("1 conversations", 2.0, 1.9, True),
        ("16 conversations", 2.0, 2.1, False),
    ]


def test_every_target_names_a_figure_that_is_compared() -> None:
    """Each target's load has its figure."""
    assert all(target.figure in FIGURES[target.load] for target in TARGETS)


def test_a_round_without_answers_has_no_ratio() -> None:
    """A peer whose requests all failed has medians and no ratio, and its column shows so."""
    failed = summarize([outcome(0, error="status 500")], 1.0)
    ours, theirs = rounds(level(1, 1)), rounds(failed)
    assert ratios(ours, theirs) == {}
    head, _, *lines = table({"ours": ours, "vllm": theirs})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert cells == [
        ["", "ours", "vllm"],
        ["1 at once: tokens/s", "1", "0.0"],
        ["1 at once: first token p50, ms", "1", "-"],
        ["1 at once: first token p99, ms", "2", "-"],
    ]


def test_likeness_is_the_common_beginning() -> None:
    """The common beginning counts, as a share of the longer answer, without outer spaces."""
    assert likeness(" the cat", "the cat") == 1.0
    assert likeness("abcd", "abxd") == 0.5
    assert likeness("ab", "abcd") == 0.5


def test_the_plot_is_an_svg_with_every_name(tmp_path: Path) -> None:
    """The plot names every server once; the same figures give the same file."""
    levels = [{**level(100, 5), "concurrency": 1}, {**level(300, 9), "concurrency": 8}]
    for name in ("a.svg", "b.svg"):
        plot({"ours": levels, "vllm": levels}, "concurrency", tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawn
    assert all(f"<!-- {name} -->" in drawn for name in ("ours", "vllm"))
    assert drawn == (tmp_path / "b.svg").read_text()


def test_a_document_is_one_line_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The printed line and the file have the same document; without a file none is written."""
    publish("test", {"levels": [1, 2]}, tmp_path / "kept.json")
    publish("test", {"levels": [1, 2]}, None)
    first, second = capsys.readouterr().out.splitlines()
    kept = (tmp_path / "kept.json").read_text(encoding="utf-8")
    document = json.loads(kept)
    assert json.loads(first) == json.loads(second) == document
    assert (document["benchmark"], document["levels"]) == ("test", [1, 2])
    assert document["date"]
    assert kept.count("\n") > 3
    assert list(tmp_path.iterdir()) == [tmp_path / "kept.json"]
