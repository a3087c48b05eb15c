"""Copies a replica's metrics to Ray, which exports the metrics of a node's replicas on one port.

Ray adds `ray_` before each name, and the labels `application`, `deployment` and `replica`. Every
series becomes a Ray gauge with the value from `/metrics`: also counters, and the buckets, sums and
counts of histograms. Ray's histograms would cost microseconds per token and replace an observation
by the middle of its bucket. Ray's counters would remain after the end of the replica; gauges do
not.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from ray.serve.metrics import Gauge

log = logging.getLogger(__name__)


class RayMetrics:
    """Ray's gauges for the metrics that `families` returns. Needs Serve's replica context."""

    def __init__(self, families: Callable[[], Iterable["Metric"]]) -> None:
        self._families = families
        self._gauges: dict[str, Gauge] = {}

    def start(self) -> None:
        """Copies the metrics now and every few seconds, in a thread that ends with this process."""
        threading.Thread(target=self._run, name="ray metrics", daemon=True).start()

    def copy(self) -> None:
        """Sets every gauge to the current value of its series.

        An export by Ray while only some buckets of a histogram are set would make quantiles wrong.
        So all values are collected first and then set without a switch to another thread.
        """
        values = []
        for family in self._families():
            for sample in family.samples:
                gauge = self._gauge(sample.name, family.documentation, tuple(sample.labels))
                values.append((gauge, sample.value, dict(sample.labels)))
        # After it has waited, a thread keeps Python's lock for up to 5 ms. The loop takes 2 ms.
        time.sleep(0)
        for gauge, value, labels in values:
            gauge.set(value, tags=labels)

    def _gauge(self, name: str, help: str, labels: tuple[str, ...]) -> "Gauge":
        from ray.serve.metrics import Gauge

        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=help, tag_keys=labels)
        return self._gauges[name]

    def _run(self) -> None:
        interval_s = copy_interval_s()
        pause = threading.Event()
        try:
            while True:
                self.copy()
                pause.wait(interval_s)
        except Exception:
            log.exception("Ray's metrics port no longer has this replica's metrics; use /metrics.")


def copy_interval_s() -> float:
    """Returns the seconds between two copies: half of Ray's interval between exports, which is 10 s
    by default.

    Ray exports a gauge only if it was set since the last export, and drops it after two exports.
    """
    import ray

    return max(float(ray._config.metrics_report_interval_ms()), 1000) / 2000
