"""benchmarks/README.md and the pages of the benchmarks: rows, links and newest numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path("benchmarks")
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (FOLDER / "docs").glob("*.md")}
ROW = r"^\| \[`python -m benchmarks\.(\w+)[^`]*`\]\((docs/\w+\.md)\) \| .+ \| (.+) \|$"


def rows() -> dict[str, tuple[Path, str]]:
    """Returns the page and the newest number of each benchmark in the README."""
    return {name: (FOLDER / page, cell) for name, page, cell in re.findall(ROW, README, re.M)}


def test_each_benchmark_has_a_row_and_its_page_the_command() -> None:
    """The README has each script that publishes a document, and a page has its command."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    scripts = {name for name, source in sources.items() if "publish(" in source} - {"report"}
    assert scripts == set(rows())
    for name, (page, _) in rows().items():
        assert f"python -m benchmarks.{name}" in PAGES[page], page


def test_each_page_and_each_result_is_named() -> None:
    """No page and no kept result is lost; a page is short enough to be read in one sitting."""
    assert {page for page, _ in rows().values()} == set(PAGES)
    text = "".join(PAGES.values())
    results = (path.name for path in (FOLDER / "results").iterdir())
    assert [name for name in results if f"results/{name}" not in text] == []
    assert [page for page, text in PAGES.items() if text.count("\n") > 130] == []
    assert README.count("\n") < 60


def level(document: Any, **wanted: Any) -> Any:
    """Returns the only part of the list `document` that has the items `wanted`."""
    (found,) = [each for each in document if wanted.items() <= each.items()]
    return found


def growth(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):.1f} %"


MIXED = "peers-mixed-cpu.json"
NEWEST: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "serve": (
        "serve-tiny.json",
        lambda it: [f"{level(it['levels'], concurrency=32)['tokens_per_s']:,.0f} tokens/s"],
    ),
    "peers": (
        MIXED,
        lambda it: [
            f"{it['ours_to_theirs']['ours, HAProxy']['vllm']['16 conversations: tokens/s']} times"
        ],
    ),
    "conversations": (
        MIXED,
        lambda it: [
            f"turn {turn} after {times[turn]['p50']:.0f} ms"
            for times in [
                it["medians"]["ours, HAProxy"]["conversations"]["16 conversations"][
                    "first_token_ms"
                ]
            ]
            for turn in ("6", "1")
        ],
    ),
    "long_prompts": (
        MIXED,
        lambda it: [
            f"{each['longest_gap_ms']:.0f} ms"
            for each in it["medians"]["ours, HAProxy"]["beside"].values()
        ],
    ),
    "compat": (
        "compat.json",
        lambda it: [
            f"{sum(each['passed'] for each in it['results'])} of {len(it['results'])}",
            f"{len({each['client'] for each in it['results']})} clients",
        ],
    ),
    "overhead": (
        "overhead-cpu.json",
        lambda it: [
            f"{used['replica'] + used['proxy']:.0f} µs"
            for used in [level(it["http"]["haproxy"], streams=32)["us_per_token"]]
        ],
    ),
    "engine": (
        "engine-cpu.json",
        lambda it: [
            f"{it['host']['greedy']['us_base']:.0f} µs",
            f"{it['host']['greedy']['us_per_sequence']:.2f} a sequence",
        ],
    ),
    "schedule": (
        "schedule.json",
        lambda it: [
            f"{max(load['policy']['gap_max'] for load in loads):.3f} s"
            for loads in [[load for device in it["results"].values() for load in device.values()]]
        ],
    ),
    "gpu": (
        "gpu-h200.json",
        lambda it: [
            f"{step['tokens_per_s']:,.1f}"
            for step in it["decode"]
            if step["batch"] in (1, 128) and not step["temperature"]
        ],
    ),
    "coldstart": ("coldstart-tiny.json", lambda it: [f"{it['tiny']['worker_s']:.1f} s"]),
    "start": (
        "start-tiny.json",
        lambda it: [f"{it[name]['seconds']:.1f} s" for name in ("ours", "empty")],
    ),
    "forms": (
        "forms-cpu.json",
        lambda it: [f"{100 * it['forms']['stacked']['share_of_read']:.0f} %"],
    ),
    "text": (
        "text-cpu.json",
        lambda it: [f"{it['mixtral']['us_per_token']['English']['plain']} µs"],
    ),
    "streaming": (
        "streaming-tiny.json",
        lambda it: [
            f"{level(it['posts'][name]['levels'], post_ms=100, streams=8)['tokens_per_s']:,.0f}"
            for name in ("what has come", "one chunk")
        ],
    ),
    "overload": (
        "overload-cpu.json",
        lambda it: [
            f"{100 * closed['8']['tokens_per_s'] / closed['1']['tokens_per_s']:.0f} %"
            for closed in [it["haproxy"]["closed"]]
        ],
    ),
    "constrained": (
        "constrained-cpu.json",
        lambda it: [
            f"{it['noise_by_numpy']['temperature 1']['constrained_over_free']['after']:.2f} times"
        ],
    ),
    "soak": (
        "soak-tiny.json",
        lambda it: [
            growth(it["memory_mb_after_a_tenth"]["all"], it["memory_mb_at_the_end"]["all"])
        ],
    ),
    "soak_grammars": (
        "soak-grammars-cpu.json",
        lambda it: [growth(it["rss_mb_at_each_minute"][1], it["rss_mb_at_each_minute"][-1])],
    ),
    "fair_shares": (
        "fair-shares.json",
        lambda it: [
            f"{loads['greedy answers of 1000']['ratio']['p50']:.2f} times"
            for loads in [it["results"]["h200, 32 places"]]
        ],
    ),
    "image": (
        "image.json",
        lambda it: [f"{it['image_bytes'] / 1e9:.2f} GB", f"{it['answer_seconds']:.1f} s"],
    ),
}
"""The numbers in a benchmark's row, computed from the result that its page links."""


@pytest.mark.parametrize("name", NEWEST)
def test_the_newest_number_is_that_of_the_kept_result(name: str) -> None:
    """The row has the numbers of the kept result, which the page links beside its date."""
    result, numbers = NEWEST[name]
    document = json.loads((FOLDER / "results" / result).read_text(encoding="utf-8"))
    page, cell = rows()[name]
    assert [number for number in numbers(document) if number not in cell] == []
    (linked,) = [each for each in PAGES[page].split("\n\n") if f"(../results/{result})" in each]
    assert document["date"] in linked
