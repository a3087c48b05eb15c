"""A plain Ray cluster from cluster/ray's scripts: a head and workers, all on this machine."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.machine.ports import free_port
from tests.environment import bare, haproxy_of_its_own
from tests.processes import all_below, descendants
from tests.settled import left_behind
from tests.worker.conftest import until

RAY = Path("cluster/ray")
REPLICA = "ServeReplica:mixtral"
KEY = "k" * 16
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 2,
    "upscale_delay_s": 1,
    "downscale_delay_s": 2,
    "metrics_interval_s": 1,
    "look_back_period_s": 2,
}
"""`autoscaling_config` with which a second replica starts and ends within seconds."""


class Cluster:
    """A head, and the workers that `worker` adds. `folder` holds its files and its logs."""

    def __init__(self, folder: Path, stack: ExitStack, variables: dict[str, str]) -> None:
        """`variables` are for each node's environment."""
        self.folder, self._stack = folder, stack
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.port, self.dashboard, self.http = free_port(), free_port(), free_port()
        self.environment = bare(folder) | haproxy_of_its_own(folder)
        self.environment |= {
            "API_KEYS": KEY,
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # On one machine HAProxy knows at once that a replica ends.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            **variables,
        }
        self.start_head()

    def start_head(self) -> None:
        """Starts the head, on the ports of the one before if there was one."""
        self.head = self._start(
            ["head.sh", f"--port={self.port}", f"--dashboard-port={self.dashboard}"],
            [
                # Of its own: Ray would take the workers that are here for a cluster in the old one.
                f"--temp-dir={self.folder}/ray{len(self.nodes)}",
                "--num-cpus=0",
                f"--ray-client-server-port={free_port()}",
            ],
        )

    def worker(self) -> "subprocess.Popen[bytes]":
        return self._start(["worker.sh", f"127.0.0.1:{self.port}"], ["--num-cpus=1"])

    def _start(self, command: list[str], more: list[str]) -> "subprocess.Popen[bytes]":
        program = [str((RAY / command[0]).resolve()), *command[1:], *more]
        program += [f"--dashboard-agent-listen-port={free_port()}", "--node-ip-address=127.0.0.1"]
        program += ["--object-store-memory=100000000"]
        path = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        log = self._stack.enter_context(path.open("wb"))
        process = self._stack.enter_context(
            subprocess.Popen(program, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
        )
        self._stack.callback(process.kill)
        self.nodes.append(process)
        until(lambda: process.poll() is not None or "Ray runtime started" in path.read_text())
        assert process.poll() is None, path.read_text()
        return process

    def deploy(self, args: dict[str, Any] | None = None, **options: Any) -> None:
        """Deploys the tiny model, as a user of README.md deploys Mixtral.

        `args` are settings beside those of configs/tiny.yaml, `options` the deployment's.
        """
        config = yaml.safe_load(Path("configs/tiny.yaml").read_text())
        (application,) = config["applications"]
        for section, values in (args or {}).items():
            application["args"].setdefault(section, {}).update(values)
        if options:
            application["deployments"] = [{"name": "mixtral", **options}]
        config["http_options"] = {"host": "0.0.0.0", "port": self.http}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(config))
        serve = "from ray.serve.scripts import cli; cli()"
        command = [sys.executable, "-c", serve, "deploy", "tiny.yaml"]
        command += ["--address", f"http://127.0.0.1:{self.dashboard}"]
        environment = self.environment | {"RAY_AUTH_MODE": "token"}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    def kill(self) -> None:
        """Ends every process of the cluster."""
        below = [each for node in self.nodes for each in all_below(node.pid)]
        for each in below:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(below)

    @property
    def answers(self) -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{self.http}/ping").status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def cluster(**variables: str) -> Iterator[Cluster]:
    """Yields a cluster whose nodes have `variables` in their environment."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        try:
            with ExitStack() as stack:
                it = Cluster(folder, stack, variables)
                stack.callback(it.kill)
                yield it
        finally:
            until(lambda: not killed(folder))


def killed(folder: Path) -> list[int]:
    """Returns what a process has left that died before `Cluster.kill`."""
    found = left_behind(folder)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def replicas(node: "subprocess.Popen[bytes]") -> list[str]:
    return [line for line in descendants(node.pid).values() if REPLICA in line]
