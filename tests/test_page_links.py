"""Tests links between the pages, the files that they name, and the figures of the README."""

import json
import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
PAGES = subprocess.run(LISTED, capture_output=True, text=True, check=True).stdout.split()
RESULTS = Path("benchmarks/results")


def text_of(page: Path) -> str:
    """Returns the page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes of a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", text_of(page), re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{count}" if (count := found.count(slug)) else slug)
    return set(found)


def broken(page: Path) -> list[str]:
    """Returns the relative links of a page that lead to no file or no heading."""
    text = text_of(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.M)
    found = []
    for target in targets:
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if target.startswith(("http://", "https://")):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    """Each relative link names a file in the repository and, after `#`, one of its headings."""
    assert broken(Path(page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A missing file and a missing heading are reported; a link in a code block is none."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One `x`, two\n## Again\n## Again\n[a](gone.md) [b](#no) [c](#one-x-two) [d](#again-1)\n"
        "```\n[e](gone.md)\n```\n[f](https://example.com/#x)\n"
    )
    assert broken(page) == ["gone.md", "#no"]


@pytest.mark.parametrize(
    "path", [page for page in PAGES if page.startswith(("README", "docs/runpod", "benchmarks/"))]
)
def test_the_files_that_pages_name_exist(path: str) -> None:
    """An example, a page, a result or a script that a page names is in the repository, also where
    it is no link."""
    text = re.sub(r"\]\([^)]*\)", "]", Path(path).read_text(encoding="utf-8"))
    folders = "examples|docs|benchmarks|configs|results|tests"
    for name in re.findall(rf"\b((?:{folders})/[\w./-]+\.(?:py|md|yaml|json))\b", text):
        folder = Path("benchmarks") if name.startswith("results/") else Path()
        assert (folder / name).exists(), name


def rounded(number: float) -> int:
    """Returns the nearest integer, the larger one of two."""
    return math.floor(number + 0.5)


def rows(first_cell: str) -> list[list[str]]:
    """Returns the cells of the README's table whose header begins with `first_cell`."""
    text = Path("README.md").read_text(encoding="utf-8")
    table = text[text.index(f"| {first_cell}") :].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_tokens_a_second_beside_other_servers_are_those_of_the_kept_result() -> None:
    """The README has the medians of `peers-cpu.json`, rounded."""
    medians = json.loads((RESULTS / "peers-cpu.json").read_text())["medians"]
    for concurrency, *cells in rows("requests at once"):
        assert cells == [
            str(rounded(medians[name][concurrency]["tokens_per_s"]))
            for name in ("ours", "ours, HAProxy", "vllm", "transformers", "llama.cpp")
        ]


def test_conversations_beside_other_servers_are_those_of_the_kept_result() -> None:
    """The README has the medians of `peers-mixed-cpu.json`, rounded."""
    medians = json.loads((RESULTS / "peers-mixed-cpu.json").read_text())["medians"]

    def figures(server: dict[str, Any]) -> list[float]:
        conversations, long = server["conversations"]["16 conversations"], server["long"]
        return [
            conversations["tokens_per_s"],
            conversations["first_token_ms"]["1"]["p50"],
            conversations["first_token_ms"]["6"]["p50"],
            long["7,400 tokens, 1 at once"]["ttft_ms"]["p50"],
            long["7,400 tokens, 4 at once"]["ttft_ms"]["p99"],
            server["beside"]["a stream beside 7,400 tokens"]["longest_gap_ms"],
        ]

    names = ["ours, Serve's proxy", "ours, HAProxy", "vllm", "llama.cpp"]
    columns = [figures(medians[name]) for name in names]
    expected = [[str(rounded(column[i])) for column in columns] for i in range(6)]
    assert [cells for _, *cells in rows("16 conversations")] == expected


def test_decode_rates_on_a_gpu_are_those_of_the_kept_result() -> None:
    """The README has the sampled tokens/s of `gpu-h200.json`, and the share of 4.8 TB/s that they
    read."""
    steps = json.loads((RESULTS / "gpu-h200.json").read_text())["decode"]
    decode = [step for step in steps if step["temperature"]]
    *rest, last = [f"{rounded(step['tokens_per_s']):,}" for step in decode]
    text = " ".join(Path("README.md").read_text(encoding="utf-8").split())
    assert f"Decoding reached {', '.join(rest)} and {last} tokens/s at batch sizes" in text
    shares = [step["gb_per_step"] / step["ms_per_step"] / 4.8 for step in decode]
    assert f"{rounded(100 * min(shares))} to {rounded(100 * max(shares))} % of the card's" in text
