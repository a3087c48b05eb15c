"""The benchmark of text runs through all its parts."""

from benchmarks.text import CHATS, measure
from serve_app.tiny import CHECKPOINT


def test_every_part_is_measured() -> None:
    """Loading, rendering and detokenizing have figures, with transformers' beside ours."""
    figures = measure(CHECKPOINT, num_tokens=20, repeats=1)
    beside = [figures["load_cpu_seconds"], *(figures["chat_us"][name] for name in CHATS)]
    for each in beside:
        assert each.keys() == {"ours", "transformers"}
        assert min(each.values()) > 0
    for each in figures["us_per_token"].values():
        assert min(each["plain"], each["four stop strings"]) > 0
