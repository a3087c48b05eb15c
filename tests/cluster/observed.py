"""A server of the tiny model in a Ray cluster of one node, with Ray's Prometheus port."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.environment import bare
from tests.processes import all_below
from tests.settled import left_behind
from tests.worker.conftest import until
from tools.server_process import free_port

PROGRAM = """
import sys
import ray
from ray import serve
from serve_app.app import build_app
from serve_app.config.settings import Settings

folder, http, metrics = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
    _temp_dir=f"{folder}/ray", _metrics_export_port=metrics,
)
serve.start(http_options={"host": "127.0.0.1", "port": http})
serve.run(build_app(Settings.from_yaml("configs/tiny.yaml")), route_prefix="/")
print("ready", flush=True)
sys.stdin.read()
"""
VARIABLES = {
    "MIXTRAL_OBSERVABILITY__LOG_FORMAT": "json",
    "RAY_metrics_report_interval_ms": "1000",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Observed:
    """The server; `metrics` is the URL of Ray's port, `folder` has Ray's files."""

    def __init__(self, folder: Path, http: int, metrics: int) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{http}"
        self.targets = {"server": f"127.0.0.1:{http}", "ray": f"127.0.0.1:{metrics}"}

    def text(self, target: str) -> str:
        """What Prometheus reads from "server", which is `/metrics`, or from "ray"."""
        return httpx.get(f"http://{self.targets[target]}/metrics").text

    def log_lines(self) -> list[dict[str, object]]:
        """The lines of the replica's log, without the first, which Serve writes before our code
        runs."""
        (path,) = self.folder.glob("ray/session_2*/logs/serve/replica_*.log")
        first, *lines = path.read_text().splitlines()
        assert first.endswith("Started initializing replica.")
        return [json.loads(line) for line in lines]


@contextmanager
def observed() -> Iterator[Observed]:
    """A running server, until the block ends."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, http, metrics = Path(name), free_port(), free_port()
        command = [sys.executable, "-c", PROGRAM, name, str(http), str(metrics)]
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(
                command,
                env=bare(folder) | VARIABLES,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n", (folder / "log").read_text()
                yield Observed(folder, http, metrics)
            finally:
                for each in all_below(process.pid):
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                process.kill()
        until(lambda: not left_behind(folder))
