"""cluster/ray: its scripts start a head and workers, all on this machine."""

import json
import os
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.config.settings import Settings
from tests.cluster.plain_ray import KEY, RAY, cluster, replicas
from tests.environment import bare, haproxy_of_its_own
from tests.ports import observed, undocumented
from tests.worker.conftest import until


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
