"""The conversion of the YAML to a deployment, and of Ray's failures to errors, without starting
Ray."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve_app.app import build_app
from serve_app.cold_start import killed
from serve_app.cold_start.killed import MemoryBefore
from serve_app.cold_start.load_records import KILLED
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import EngineDead, InternalError, ModelLoadFailed, QueueFull, ServeError
from serve_app.node import client, deployment, ray_node
from serve_app.start_plan.plan import plan_start

TINY = Settings.from_args({"model": {"name": "tiny", "quantization": "none"}}, "test")


def overridden(given: dict[str, Any]) -> Any:
    return deployment._overridden(build_app(TINY), given)._bound_deployment


def test_the_yamls_overrides_reach_the_deployment() -> None:
    """`deployments:` means what it means under `serve run`; the settings stay bound."""
    plain = overridden({})
    given = {"name": "mixtral", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    changed = overridden({"deployments": [given]})
    assert (plain.num_replicas, changed.num_replicas) == (1, 2)
    assert changed.ray_actor_options["num_cpus"] == 0.5
    assert changed.max_ongoing_requests == plain.max_ongoing_requests
    assert changed.init_args == (TINY, None)


@pytest.mark.parametrize(
    "override", [{"name": "other"}, {"name": "mixtral", "replicas": 2}, {"num_replicas": 2}]
)
def test_an_override_that_fits_nothing_is_refused(override: dict[str, Any]) -> None:
    """A misspelt deployment or option is an error, not a default."""
    with pytest.raises(ConfigError, match="deployments"):
        overridden({"deployments": [override]})


def test_replicas_that_do_not_fit_are_refused() -> None:
    """The error names what is missing; Serve would wait for it for ever."""
    on_gpu = Settings.from_args({"model": {"device": "cuda"}}, "test")
    one = build_app(on_gpu)._bound_deployment
    deployment.require_resources(one, {"CPU": 2, "GPU": 1})
    with pytest.raises(ModelLoadFailed, match="needs 1 GPUs, but Ray finds 0"):
        deployment.require_resources(one, {"CPU": 2})
    three = overridden({"deployments": [{"name": "mixtral", "num_replicas": 3}]})
    with pytest.raises(ModelLoadFailed, match="needs 3 CPUs, but Ray finds 2"):
        deployment.require_resources(three, {"CPU": 2})
    auto = overridden({"deployments": [{"name": "mixtral", "num_replicas": "auto"}]})
    deployment.require_resources(auto, {"CPU": 2})


def test_keys_that_are_ignored_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log names them, of the application and of the whole file."""
    application = {"name": "mixtral", "args": {}, "runtime_env": {"pip": []}}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"applications": [application], "logging_config": {}}))
    deployment.log_unused_keys(path)
    assert "runtime_env" in caplog.text
    assert "logging_config" in caplog.text
    assert "args" not in caplog.text


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ray.exceptions.RayActorError(), EngineDead),
        (ray.exceptions.WorkerCrashedError(), EngineDead),
        (ray.exceptions.OutOfMemoryError("node"), EngineDead),
        (DeploymentUnavailableError(None), EngineDead),
        (BackPressureError(1, 1), QueueFull),
        (ray.exceptions.RayTaskError("f", "Traceback ...", ValueError("x")), InternalError),
    ],
)
def test_rays_errors_become_ours_by_their_kind(error: Exception, kind: type[ServeError]) -> None:
    """A dead process can be retried elsewhere; a bug cannot; neither shows Ray's own text."""
    known = client.from_ray(error)
    assert type(known) is kind
    assert "Traceback" not in known.message


def test_the_loads_own_sentence_is_the_cause(tmp_path: Path) -> None:
    """The error in the load log becomes the error of the start, with its `retry`."""
    path = tmp_path / "load.jsonl"
    settings = TINY.model_copy(update={"load_log": str(path)})
    unknown = deployment._load_failure(settings, plan_start(settings), MemoryBefore())
    assert (unknown.retry, "in the worker's log" in unknown.message) == (True, True)
    failed = {"phase": "read", "state": "failed", "error": "File cut off.", "retry": False}
    path.write_text(json.dumps(failed) + "\n")
    known = deployment._load_failure(settings, plan_start(settings), MemoryBefore())
    assert (known.message, known.retry) == ("File cut off.", False)


def test_a_replica_that_vanished_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the bytes needed and free, and says if the kernel killed it for memory."""
    path = tmp_path / "load.jsonl"
    settings = TINY.model_copy(update={"load_log": str(path)})
    path.write_text('{"phase": "read", "state": "started", "at": 1}\n')
    said = deployment._load_failure(settings, plan_start(settings), MemoryBefore())
    assert said.message.startswith(f"{KILLED} in phase read, usually for lack of memory: ")
    assert "it takes 11.0 MB for its weights and 0.13 GB for its KV cache" in said.message
    assert re.search(r"and \d+\.\d\d GB of main memory were free", said.message)
    assert said.retry
    before = MemoryBefore()
    monkeypatch.setattr(killed, "num_oom_kills", lambda: before.num_kills + 1)
    certain = deployment._load_failure(settings, plan_start(settings), before)
    assert f"{KILLED} in phase read because memory ran out: " in certain.message
    assert not certain.retry


@pytest.fixture
def restored() -> Iterator[None]:
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


def test_signals_are_given_back(restored: None) -> None:
    """Ray may replace the handler of SIGTERM while it starts; afterwards the former one is back."""

    def ours(*_: Any) -> None: ...

    signal.signal(signal.SIGTERM, ours)
    with ray_node.signals_kept():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is ours


def test_what_a_start_that_failed_has_left_is_ended() -> None:
    """A failed start's processes are killed, although `ray.is_initialized()` is false."""
    code = """
import subprocess, sys
from serve_app.start_plan.plan import plan_start
from serve_app.node import ray_node, ray_processes
sleep = ["ray::left", "-c", "import time; time.sleep(1000)"]
with subprocess.Popen(sleep, executable=sys.executable) as left:
    ray_node.kill()
    ended = not ray_processes.below()
    left.kill()
sys.exit(not ended)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ray_is_started_once_more() -> None:
    """A start that fails is ended and tried again; then the caller gets one sentence about what
    usually causes it, and the log has both reasons."""
    code = """
import os, subprocess, sys
import ray
from serve_app.errors import ModelLoadFailed
from serve_app.node import ray_node, ray_processes
sleep = ["ray::left", "-c", "import time; time.sleep(1000)"]
left = []

def init(**_):
    assert not ray_processes.below()
    left.append(subprocess.Popen(sleep, executable=sys.executable))
    raise TimeoutError("no port")

ray.init = init
try:
    ray_node.start()
except ModelLoadFailed as error:
    print(error.retry, error, flush=True)
    ray_node.stop()
    sys.exit(len(left) != 2)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Ray did not start (no port); starting it once more." in done.stderr
    assert b"Ray did not start again (no port)." in done.stderr
    assert done.stdout.startswith(b"True Ray did not start on this machine; the log")
    assert b"`ulimit -u`" in done.stdout
