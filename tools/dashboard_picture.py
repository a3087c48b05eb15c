"""Draws the panels of cluster/grafana with the data that a Prometheus has, without Grafana.

    python -m tools.dashboard_picture http://127.0.0.1:9090 dashboard.png

Each panel has its place, title, unit, legend and queries from the dashboard's file, and the values
that Prometheus returns for them over the last minutes. A query without values is named in the
panel.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

DASHBOARD = Path(__file__).parents[1] / "cluster" / "grafana" / "mixtral-serve.json"
NUM_POINTS = 200
GRID_WIDTH = 24
"""Columns of Grafana's grid."""
UNITS = {"bytes": ["B", "KiB", "MiB", "GiB", "TiB"], "short": ["", " K", " Mil", " Bil"]}
"""Names that Grafana gives to the powers of 1,024 or 1,000."""


def unit_text(value: float, unit: str) -> str:
    """Returns the value as Grafana writes it for a panel's unit. Raises `KeyError` for another
    unit."""
    if unit in ("reqps", "ops"):
        return f"{value:.3g} {'req' if unit == 'reqps' else 'ops'}/s"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit == "s":
        for scale, name in ((1, "s"), (1e-3, "ms"), (1e-6, "µs")):
            if abs(value) >= scale:
                return f"{value / scale:.3g} {name}"
        return "0 s"
    base = 1024 if unit == "bytes" else 1000
    names = list(UNITS[unit])
    while abs(value) >= base and len(names) > 1:
        value /= base
        names.pop(0)
    return f"{value:.3g}{' ' if unit == 'bytes' else ''}{names[0]}"


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """Returns the name of a series: the target's `legendFormat` with the series' labels."""
    text: str = target["legendFormat"]
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


class Source:
    """The values of the last `minutes` minutes in the Prometheus at `url`."""

    def __init__(self, url: str, minutes: float, rate_interval: str) -> None:
        self._url = url
        self._rate_interval = rate_interval
        self.end = time.time()
        self.start = self.end - minutes * 60

    def series(self, target: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
        """Times in seconds and values of each series of a query, by its name in the legend."""
        parameters = {
            "query": target["expr"].replace("$__rate_interval", self._rate_interval),
            "start": self.start,
            "end": self.end,
            "step": (self.end - self.start) / NUM_POINTS,
        }
        response = httpx.get(f"{self._url}/api/v1/query_range", params=parameters, timeout=60)
        found = response.raise_for_status().json()["data"]["result"]
        return {
            legend(target, each["metric"]): [(at, float(value)) for at, value in each["values"]]
            for each in found
        }


def draw(axes: Any, panel: dict[str, Any], source: Source) -> None:
    """Draws one panel."""
    defaults = panel["fieldConfig"]["defaults"]
    axes.set_title(panel["title"], fontsize=9, loc="left")
    is_bars = panel["type"] == "bargauge"
    missing = []
    for target in panel["targets"]:
        series = source.series(target)
        if not series:
            missing.append(defaults.get("noValue", f"No data for {target['refId']}"))
        for name, points in series.items():
            if is_bars:
                axes.barh(name, points[-1][1])
            else:
                times, values = zip(*points, strict=True)
                axes.plot([at - source.end for at in times], values, label=name, linewidth=1)
    if is_bars:
        axes.set_xlim(defaults["min"], None)
        axes.xaxis.set_major_formatter(lambda value, _: unit_text(value, defaults["unit"]))
    else:
        axes.set_xlim(source.start - source.end, 0)
        axes.set_ylim(defaults["min"], defaults.get("max"))
        axes.yaxis.set_major_formatter(lambda value, _: unit_text(value, defaults["unit"]))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=6, loc="upper left")
    axes.text(0.5, 0.5, "\n".join(missing), ha="center", transform=axes.transAxes)
    axes.tick_params(labelsize=6)


def main(
    url: Annotated[str, typer.Argument(help="Address of the Prometheus.")],
    out: Annotated[Path, typer.Argument(help="Picture to write; its suffix names the format.")],
    minutes: float = 60,
    rate_interval: Annotated[str, typer.Option(help="Four times the scrape interval.")] = "1m",
) -> None:
    """Draws the dashboard with the values of the last minutes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    source = Source(url, minutes, rate_interval)
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = pyplot.figure(figsize=(16, height * 0.36), layout="constrained")
    grid = figure.add_gridspec(height, GRID_WIDTH)
    for panel in panels:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        draw(figure.add_subplot(grid[y : y + h, x : x + w]), panel, source)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    typer.run(main)
