"""What the deployment adds to the server: options of Serve, and the end of a replica."""

import subprocess
import sys
from typing import Any

import pytest

from serve_app.app import application, build_app
from serve_app.config.settings import Settings
from serve_app.start_plan.plan import plan_start

REPLICA = """
import sys, threading
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
server = made["replica"](Settings(model={"name": "tiny", "quantization": "none"}))
server.check_health()
print("alive", flush=True)
server.close()  # the engine's thread ends
try:
    server.check_health()
except EngineDead as error:
    print(error, flush=True)
threading.Event().wait()
"""


def test_a_replica_ends_with_its_engine() -> None:
    """A health check raises that the engine is dead, and the process ends with code 1."""
    done = subprocess.run(
        [sys.executable, "-c", REPLICA], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == [
        "alive",
        "The engine has stopped; another replica can answer.",
    ]
    assert done.returncode == 1, done.stderr


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
    """A full queue is refused by the engine; a load that fails is not repeated by Serve."""
    settings = Settings(engine={"max_num_seqs": 8, "max_waiting": 20})
    deployment = build_app(settings)._bound_deployment
    assert deployment.max_ongoing_requests == 8 + 20 + 64
    config = deployment._deployment_config
    assert (config.health_check_period_s, config.health_check_timeout_s) == (5, 30)
    assert config.graceful_shutdown_timeout_s == 30
    assert config.max_constructor_retry_count == 1


def test_the_plan_crosses_ray_with_the_deployment() -> None:
    """A replica on this machine does not look at the checkpoint again."""
    settings = Settings.from_yaml("configs/tiny.yaml")
    plan = plan_start(settings)
    assert application(settings, plan=plan)._bound_deployment.init_args == (settings, plan)
