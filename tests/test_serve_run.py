"""Ray's own `serve run configs/tiny.yaml`, with the variables of `cluster/kuberay`.

Serve starts HAProxy as in a cluster, without `mixtral-serve run` around it.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve_app.machine.ports import free_port
from tests.cluster.manifests import containers, rayservice
from tests.environment import bare, haproxy_of_its_own
from tests.listening import listening
from tests.ports import undocumented
from tests.processes import all_below, one_below, running
from tests.settled import left_behind
from tests.worker.conftest import until

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[1]
Run = tuple["subprocess.Popen[bytes]", str]


def variables(folder: Path) -> dict[str, str]:
    """Returns the manifest's variables, with files and ports beside whatever else runs here."""
    env = containers(rayservice())[0]["env"]
    return {
        **{entry["name"]: entry["value"] for entry in env if entry["name"].startswith("RAY_")},
        **haproxy_of_its_own(folder),
        "RAY_AUTH_MODE": "token",  # as the operator sets it
        "RAY_AUTH_TOKEN": "a" * 64,
        "API_KEYS": "k" * 16,
    }


@pytest.fixture
def run() -> Iterator[Run]:
    # A short path, because a socket's has at most 97 characters.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder, port = Path(name), free_port()
        config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = port
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        serve = "from ray.serve.scripts import cli; cli()"
        command = [sys.executable, "-c", serve, "run", "--address", "local"]
        command += ["--app-dir", str(ROOT), str(folder / "tiny.yaml")]
        environment = bare(folder) | variables(folder)
        with (
            (folder / "log").open("wb") as log,
            subprocess.Popen(command, cwd=folder, env=environment, stderr=log, stdout=log) as run,
        ):
            url = f"http://127.0.0.1:{port}"
            until(lambda: run.poll() is not None or answers(url), 100)
            assert run.poll() is None, (folder / "log").read_text()[-2000:]
            yield run, url
            for each in all_below(run.pid):
                each.kill()
            run.kill()
        until(lambda: not left_behind(folder))


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ping").status_code == 200
    except httpx.TransportError:
        return False


def test_serve_runs_haproxy_as_a_cluster_does(run: Run) -> None:
    """Limits and guard hold, and HAProxy ends with its owner.

    Its ports are where docs/security.md says, and have the guard that it says.
    """
    process, url = run
    assert httpx.get(f"{url}/{'a' * 8192}").status_code == 414
    assert httpx.get(f"{url}/ping", headers=[(b"x-request-id", b"\xff")]).status_code == 400

    def haproxys() -> dict[Any, int]:
        found = dict[Any, int]()
        for each, _, port in listening(process.pid):
            with suppress(psutil.NoSuchProcess):  # one that Serve has just replaced
                found |= {each: port} if each.name() == "haproxy" else {}
        return found

    # One that Serve has replaced no longer listens.
    until(lambda: list(haproxys().values()) == [int(url.rpartition(":")[2])])
    assert undocumented(process.pid, "`serve run`") == set()
    last = set(haproxys())
    os.kill(one_below(process.pid, "ray::HAProxyManager"), signal.SIGKILL)
    until(lambda: not last & running())
