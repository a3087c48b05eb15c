"""`/ping` on PORT, with PORT_HEALTH equal to it or unset, as RunPod's load balancer asks for it."""

import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from serve_app.machine.ports import free_port
from tests.settled import left_behind
from tests.worker.conftest import until
from tests.worker.process import ENTRY, TINY, environment

POLL_S = 0.02
"""Far shorter than RunPod's pause, so that polls fall into the hand-over."""


class LoadBalancer:
    """Asks `/ping` without pause, each time with a new connection."""

    def __init__(self, port: int) -> None:
        self.answers: list[int | None] = []
        """The status of each answer; None for a poll that got none."""
        self._url = f"http://127.0.0.1:{port}/ping"
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> "LoadBalancer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._is_over.wait(POLL_S):
            try:
                self.answers.append(httpx.get(self._url, timeout=30).status_code)
            except httpx.TransportError:
                self.answers.append(None)


@pytest.fixture(params=["1", "0"], ids=["HAProxy", "Serve's proxy"])
def variables(request: pytest.FixtureRequest) -> dict[str, str]:
    return {"RAY_SERVE_ENABLE_HA_PROXY": request.param}


@pytest.mark.ray
def test_ping_on_the_servers_own_port(tmp_path: Path, variables: dict[str, str]) -> None:
    """204 from the first answer until the model is loaded, then 200: one poll may be lost.

    Headers that Serve reads do no harm behind either proxy; `/health` says which one it is.
    """
    port = free_port()
    if variables["RAY_SERVE_ENABLE_HA_PROXY"] == "0":  # else unset, which means the same
        variables["PORT_HEALTH"] = str(port)
    given = environment(
        tmp_path, RUNPOD_SERVERLESS="false", SERVE_CONFIG=str(TINY), PORT=str(port), **variables
    )
    command = [sys.executable, str(ENTRY)]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, cwd=tmp_path, env=given, stderr=log) as entry,
        LoadBalancer(port) as balancer,
    ):
        try:
            until(lambda: balancer.answers[-50:].count(200) == 50 or entry.poll() is not None, 90)
            models = f"http://127.0.0.1:{port}/v1/models"
            assert httpx.get(models).status_code == 200
            notes = " ".join(httpx.get(f"http://127.0.0.1:{port}/health").json()["notes"])
            is_haproxy = variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
            assert ("Serve's own proxy receives the requests" in notes) is not is_haproxy
            # Serve's own proxy has the guard too.
            assert httpx.get(models, headers=[(b"x-session-id", b"\xff")]).status_code == 200
            assert httpx.get(models, headers=[(b"x-request-id", b"\xff")]).status_code == 400
        finally:
            entry.terminate()
            code = entry.wait(60)
    until(lambda: not left_behind(tmp_path))
    assert code == 0, (tmp_path / "log").read_text()
    answers = balancer.answers[balancer.answers.index(204) :]
    loading, loaded = answers[: answers.index(200)], answers[answers.index(200) :]
    # The last polls fall into the stop.
    served = loaded[: len(loaded) - loaded[::-1].index(200)]
    num_lost = len(loading) - loading.count(204) + len(served) - served.count(200)
    assert num_lost <= 1, (set(loading), set(served))
