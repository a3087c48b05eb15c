"""The deployment's additions to the server: Serve's options, and the end of a replica."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.client import ServeControllerClient
from ray.serve.config import HTTPOptions, ProxyLocation

from serve_app.app import application, build_app, warn_if_open
from serve_app.config.settings import Settings
from serve_app.start_plan.plan import plan_start

REPLICA = """
import asyncio, os, sys, threading
from serve_app import app
from serve_app.errors import EngineDead
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings

made = {}
def ingress(_):
    return lambda replica: made.setdefault("replica", replica)
from ray import serve
serve.ingress = ingress
app.build_app(Settings(model={"name": "tiny", "quantization": "none"}))
settings = Settings(
    model={"name": "tiny", "quantization": "none"}, engine={"step_timeout_s": 0.1}
)
server = made["replica"](settings)
server.check_health()
print("alive", flush=True)

def say(*words):
    # One write, because two threads call it, and `print` writes the end of a line separately.
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def ask():
    async for item in server.call("POST", "/prompt", {"prompt": "x"}, "7"):
        say(item["status"], item["error"]["error"]["code"])

def hang():
    server._engine._core._runner.launch = lambda scheduled: threading.Event().wait()
    threading.Thread(target=asyncio.run, args=[ask()]).start()

def broken():
    raise RuntimeError("broken")

{END}
"""
CHECKED = """
while True:
    try:
        server.check_health()
    except EngineDead as error:
        say(error)
        break
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("end", "answers"), [("server.close()", []), ("hang()", ["503 engine_dead"])]
)
def test_a_replica_ends_with_its_engine(end: str, answers: list[str]) -> None:
    """Where the engine has stopped or hangs, a health check raises that it is dead, running
    requests are answered 503, and the process ends with code 1."""
    code = REPLICA.replace("{END}", end) + CHECKED
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    alive, *rest = done.stdout.splitlines()
    assert alive == "alive"
    assert sorted(rest) == [*answers, "The engine has stopped; another replica can answer."]
    assert done.returncode == 1, done.stderr


def test_a_replica_ends_when_a_request_loses_the_engine() -> None:
    """The process ends with the first request that fails, not with the next request or health
    check, so that the second try of a RunPod job finds a living replica."""
    end = "server._engine._core._step = broken\nasyncio.run(ask())\nthreading.Event().wait()"
    code = REPLICA.replace("{END}", end)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["alive", "503 engine_dead"]
    assert done.returncode == 1, done.stderr


CHILD = """
import threading
from serve_app import app
app.end_with_parent()
print("watches", flush=True)
threading.Event().wait()
"""
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def test_a_replica_ends_with_its_raylet() -> None:
    """A process whose parent is killed ends, which closes its output."""
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"watches\n"
        parent.kill()
        assert parent.stdout.read() == b""


@pytest.mark.parametrize(
    ("model", "num_gpus"),
    [
        ({"name": "tiny"}, 0),
        ({"name": "tiny", "device": "cuda"}, 1),
        ({}, 1),
        ({"device": "cpu"}, 0),
    ],
)
def test_a_replica_reserves_a_gpu_where_it_computes_on_one(
    model: dict[str, Any], num_gpus: int
) -> None:
    """Ray gives a replica only the GPUs that it reserves."""
    options = build_app(Settings(model=model))._bound_deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (1, num_gpus)


def test_the_deployment_leaves_limits_to_the_engine() -> None:
    """A full queue is refused by the engine, far below Serve's limits, whose answer is a 429 too; a
    load that fails is not repeated by Serve."""
    settings = Settings(engine={"max_num_seqs": 8, "max_waiting": 20})
    deployment = build_app(settings)._bound_deployment
    config = deployment._deployment_config
    assert (deployment.max_ongoing_requests, config.max_queued_requests) == (20_000, 1_000)
    assert config.backpressure_config.status_code == 429
    assert config.backpressure_config.retry_after_s == 10
    assert (config.health_check_period_s, config.health_check_timeout_s) == (5, 30)
    assert config.graceful_shutdown_timeout_s == 30
    assert config.max_constructor_retry_count == 1


@pytest.mark.parametrize("form", ["json", "text"])
def test_serves_first_line_is_json_where_serve_logs_it(form: str) -> None:
    """Under `serve run` the deployment asks Serve for JSON; where this package starts Serve, it
    leaves the level of Serve's log to the application."""
    settings = Settings(observability={"log_format": form})
    expected = {"encoding": "JSON"} if form == "json" else None
    found = build_app(settings)._bound_deployment._deployment_config.logging_config
    assert (found and {"encoding": found["encoding"]}) == expected
    bare = application(settings)._bound_deployment._deployment_config
    assert bare.logging_config is None


def test_the_plan_crosses_ray_with_the_deployment() -> None:
    """A replica on this machine does not look at the checkpoint again."""
    settings = Settings.from_yaml("configs/tiny.yaml")
    plan = plan_start(settings)
    assert application(settings, plan=plan)._bound_deployment.init_args == (settings, plan)


@pytest.mark.parametrize(
    ("host", "location", "is_warned"),
    [
        ("0.0.0.0", ProxyLocation.HeadOnly, True),
        ("::", ProxyLocation.EveryNode, True),
        ("127.0.0.1", ProxyLocation.HeadOnly, False),
        ("0.0.0.0", ProxyLocation.Disabled, False),
    ],
)
def test_an_open_server_without_keys_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    host: str,
    location: ProxyLocation,
    is_warned: bool,
) -> None:
    """Under `serve run` the replica's log says it; not where no other machine can send requests."""
    options = SimpleNamespace(host=host, port=8000, location=location)
    client = SimpleNamespace(http_config=options)
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    with caplog.at_level("WARNING"):
        warn_if_open()
    assert ("WITHOUT an API key" in caplog.text) is is_warned
    assert hasattr(ServeControllerClient, "http_config")
    assert vars(options).keys() <= HTTPOptions.model_fields.keys()
