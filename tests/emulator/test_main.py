"""`python -m emulator`, with a worker and a client that have only what it prints."""

import os
import subprocess
import sys
from pathlib import Path

from serve_app.machine.ports import free_port
from tests.worker.conftest import SCRIPT

ROOT = Path(__file__).parents[2]


CLIENT = """
import os, runpod
endpoint = runpod.Endpoint(os.environ["RUNPOD_ENDPOINT_ID"], api_key=os.environ["RUNPOD_API_KEY"])
print(endpoint.run_sync({"prompt": "twice"}))
"""


def test_what_it_prints_connects_a_worker_and_a_client(tmp_path: Path) -> None:
    """With the printed lines as their environment, RunPod's client gets the worker's answer."""
    port = str(free_port())
    command = [sys.executable, "-u", "-m", "emulator", "--port", port]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as platform:
        assert platform.stdout is not None
        lines = []
        while "Running on" not in (line := platform.stdout.readline()):
            lines.append(line)
        exports = "".join(line for line in lines if line.startswith("export "))
        worker = f"{exports} exec {sys.executable} {SCRIPT} --drain-s 0"
        client = f"{exports} exec {sys.executable} -c '{CLIENT}'"
        home = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(["bash", "-c", worker], env=home) as taking:
            done = subprocess.run(
                ["bash", "-c", client], env=home, capture_output=True, text=True, check=False
            )
            taking.terminate()
        platform.terminate()
    assert done.stdout == "{'text': 'twice'}\n", done.stderr
