"""What the deployment adds to the server: a replica ends with its engine."""

import subprocess
import sys

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
    """Whoever asks is told that the engine is dead, and then the process ends with code 1."""
    done = subprocess.run(
        [sys.executable, "-c", REPLICA], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.splitlines() == [
        "alive",
        "The engine has stopped; another replica can answer.",
    ]
    assert done.returncode == 1, done.stderr
