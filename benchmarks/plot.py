"""Plots a result: tokens per second and time to first token over load, one line per server."""

from pathlib import Path
from typing import Any


def plot(series: dict[str, list[dict[str, Any]]], load: str, path: Path) -> None:
    """Writes an SVG; `load` is the key of a level's load, "concurrency" or "rate"."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures, the same file
    from matplotlib import pyplot

    figure, (speed, wait) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    label = "requests at once" if load == "concurrency" else "requests a second"
    for name, all_levels in series.items():
        levels = [level for level in all_levels if level["ttft_ms"]]
        loads = [level[load] for level in levels]
        (line,) = speed.plot(
            loads, [level["tokens_per_s"] for level in levels], marker="o", label=name
        )
        for quantile, style, face in (("p50", "-", None), ("p99", ":", "white")):
            wait.plot(
                loads,
                [level["ttft_ms"][quantile] for level in levels],
                marker="o",
                linestyle=style,
                markerfacecolor=face,
                color=line.get_color(),
            )
    ticks = sorted({level[load] for levels in series.values() for level in levels})
    speed.set(ylabel="tokens a second", ylim=(0, None))
    wait.set(ylabel="first token, ms: median, and hollow p99", yscale="log")
    for axes in (speed, wait):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(series), fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
