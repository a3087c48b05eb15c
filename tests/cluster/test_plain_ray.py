"""cluster/ray: its scripts start a head and workers, all on this machine."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config.settings import Settings
from tests.environment import bare, haproxy_of_its_own
from tests.ports import observed, undocumented
from tests.processes import all_below, descendants
from tests.settled import left_behind
from tests.worker.conftest import until
from tools.server_process import free_port

RAY = Path("cluster/ray")
REPLICA = "ServeReplica:mixtral"
KEY = "k" * 16


class Cluster:
    """A head, and the workers that `worker` adds. `folder` holds its files and its logs."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.port, self.dashboard, self.http = free_port(), free_port(), free_port()
        self.environment = bare(folder) | haproxy_of_its_own(folder)
        self.environment |= {
            "API_KEYS": KEY,
            "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            # On one machine HAProxy knows at once that a replica ends.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }
        self.head = self._start(
            ["head.sh", f"--port={self.port}", f"--dashboard-port={self.dashboard}"],
            [
                f"--temp-dir={folder}/ray",
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

    def deploy(self) -> None:
        """The tiny model, as a user of README.md deploys Mixtral."""
        config = yaml.safe_load(Path("configs/tiny.yaml").read_text())
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
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        try:
            with ExitStack() as stack:
                it = Cluster(folder, stack)
                stack.callback(it.kill)
                yield it
        finally:
            until(lambda: not killed(folder))


def killed(folder: Path) -> list[int]:
    """What a process has left that died before `Cluster.kill`."""
    found = left_behind(folder)
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found


def replicas(node: "subprocess.Popen[bytes]") -> list[str]:
    return [line for line in descendants(node.pid).values() if REPLICA in line]


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_worker_that_ends_finishes_its_streams() -> None:
    """After SIGTERM its stream ends whole, another worker takes over, and its processes are gone.

    The token is for the user alone. Both nodes listen as docs/security.md says, and are guarded so.
    """
    with cluster() as it:
        first = it.worker()
        it.deploy()
        until(lambda: it.answers, 150)
        assert stat.S_IMODE((it.folder / ".ray" / "auth_token").stat().st_mode) == 0o600
        assert len(replicas(first)) == 1
        for node in (it.head, first):
            assert undocumented(node.pid, "cluster") == set()
        assert ("haproxy", "open", "key") in observed(it.head.pid)
        second = it.worker()
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        url, headers = f"http://127.0.0.1:{it.http}/prompt", {"Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            first.send_signal(signal.SIGTERM)
            *_, last, _, done, _ = lines
        assert json.loads(last.removeprefix("data: "))["finish_reason"] == "length"
        assert done == "data: [DONE]"
        first.wait(120)
        assert replicas(second)
        until(lambda: it.answers)


def test_a_worker_needs_the_token(tmp_path: Path) -> None:
    """Without a token it ends with one sentence, before it starts Ray."""
    environment = bare(tmp_path) | haproxy_of_its_own(tmp_path)
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    command = [str(RAY / "worker.sh"), "127.0.0.1:1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("There is no token: copy ~/.ray/auth_token from the head")


@pytest.mark.parametrize("name", ["head.sh", "worker.sh"])
def test_a_node_needs_our_haproxy(name: str, tmp_path: Path) -> None:
    """Without `mixtral-haproxy` on PATH, where Serve would start HAProxy without our limits."""
    path = os.pathsep.join(str(Path(shutil.which(it) or "").parent) for it in ("bash", "dirname"))
    command = [str(RAY / name), "127.0.0.1:1"]
    environment = {"PATH": path, "HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "mixtral-haproxy is not on PATH" in done.stderr


def test_serve_takes_the_configuration() -> None:
    """mixtral.yaml passes Serve's schema and our settings; streams end before a worker does."""
    config = yaml.safe_load((RAY / "mixtral.yaml").read_text())
    ServeDeploySchema.model_validate(config)
    settings = Settings.from_yaml(str(RAY / "mixtral.yaml"))
    (deployment,) = config["applications"][0]["deployments"]
    grace_s = deployment["graceful_shutdown_timeout_s"]
    assert grace_s > settings.api.request_timeout_s + 30
    assert f"DRAIN_TIMEOUT_S:-{grace_s + 5}}}" in (RAY / "worker.sh").read_text()
