"""A server of the tiny model in a Ray cluster of one node, with Ray's Prometheus port."""

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.environment import bare
from tests.settled import left_behind
from tests.worker.conftest import until

PROGRAM = """
import sys
import ray
from ray import serve
from serve_app.app import build_app
from serve_app.config.settings import Settings

folder, http = sys.argv[1], int(sys.argv[2])
ray.init(
    num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
    _temp_dir=f"{folder}/ray",
)
serve.start(http_options={"host": "127.0.0.1", "port": http})
serve.run(build_app(Settings.from_yaml("configs/tiny.yaml")), route_prefix="/")
print("metrics on port", ray.nodes()[0]["MetricsExportPort"], flush=True)
sys.stdin.read()
"""
READY = b"metrics on port "
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
        """Returns what Prometheus reads from "server", which is `/metrics`, or from "ray"."""
        return httpx.get(f"http://{self.targets[target]}/metrics").text

    def log_lines(self) -> list[dict[str, object]]:
        """Returns the lines of the replica's log."""
        (path,) = self.folder.glob("ray/session_2*/logs/serve/replica_*.log")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def has_metrics(self) -> bool:
        """Returns whether Ray's port has the replica's; Ray opens it after the replica's start."""
        try:
            return "ray_mixtral_" in self.text("ray")
        except httpx.TransportError:
            return False


@contextmanager
def observed() -> Iterator[Observed]:
    """Yields a running server, until the block ends."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, reserved_port() as http:
        folder = Path(name)
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, name, str(http)],
                env=bare(folder) | VARIABLES,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                line = next((it for it in process.stdout if it.startswith(READY)), None)
                assert line is not None, (folder / "log").read_text()
                it = Observed(folder, http, int(line.removeprefix(READY)))
                until(it.has_metrics)
                yield it
            finally:
                until(lambda: not killed(folder))


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yields a port that is taken, except for Serve's proxy: it sets SO_REUSEPORT too."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def killed(home: Path) -> list[int]:
    """Kills the processes with this home folder, and returns them.

    One call is not enough: Ray's raylet replaces a process that ends before itself.
    """
    found = left_behind(home)
    for pid in found:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()
    return found
