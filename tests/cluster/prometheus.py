"""A real Prometheus beside a test, and the queries of the dashboard in cluster/grafana."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.machine.ports import free_port
from tests.worker.conftest import until

CONFIG = Path("cluster/prometheus/prometheus.yml")
DASHBOARD = Path("cluster/grafana/mixtral-serve.json")
RATE_INTERVAL = "15s"
"""Grafana's value of `$__rate_interval`; here three of the replica's copies to Ray."""

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="Prometheus is not installed (Debian: apt-get install prometheus)",
)


def panels() -> list[dict[str, Any]]:
    """Returns the panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[float]:
        """Returns the values that the expression has now, one for each series."""
        parameters = {"query": expression.replace("$__rate_interval", RATE_INTERVAL)}
        body = httpx.get(f"{self.url}/api/v1/query", params=parameters).json()
        assert body["status"] == "success", body
        return [float(series["value"][1]) for series in body["data"]["result"]]

    def rules(self) -> dict[str, str]:
        """Returns the state of each alert: inactive, pending or firing."""
        (group,) = httpx.get(f"{self.url}/api/v1/rules").json()["data"]["groups"]
        return {rule["name"]: rule["state"] for rule in group["rules"]}


@contextmanager
def prometheus(folder: Path, job: str, target: str) -> Iterator[Prometheus]:
    """Prometheus with cluster/prometheus/prometheus.yml: one of its jobs, once a second."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.resolve().parent / name) for name in config["rule_files"]]
    (only,) = (each for each in config["scrape_configs"] if each["job_name"] == job)
    only["static_configs"] = [{"targets": [target]}]
    config["scrape_configs"] = [only]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = ["prometheus", f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{port}"
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as it:

        def is_ready() -> bool:
            assert it.poll() is None, (folder / "prometheus.log").read_text()
            try:
                return httpx.get(f"{url}/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        try:
            until(is_ready)
            yield Prometheus(url)
        finally:
            it.terminate()
