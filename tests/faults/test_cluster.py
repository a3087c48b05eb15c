"""The behavior of a cluster of several nodes and replicas when a part of it is lost or changed."""

import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from serve_app.machine.ports import free_port
from tests.cluster.plain_ray import KEY, REPLICA, SCALING, Cluster, cluster, replicas
from tests.listening import listening
from tests.processes import all_below, descendants
from tests.worker.conftest import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(420)]
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = {"prompt": "a", "max_tokens": 1_500, "ignore_eos": True, "stream": True}
DEPLOYMENT: dict[str, Any] = {"num_replicas": 2, "graceful_shutdown_timeout_s": 150}
"""A replica that is replaced finishes its streams, as with cluster/ray/mixtral.yaml."""
START_S = 200


def url(it: Cluster, path: str) -> str:
    return f"http://127.0.0.1:{it.http}{path}"


def stream(it: Cluster, session: int, begun: Callable[[], object]) -> bool:
    """Returns whether a long answer came whole; calls `begun` after its first event."""
    headers = {**HEADERS, "x-session-id": f"session {session}"}
    last = ""
    with (
        suppress(httpx.TransportError),
        httpx.stream("POST", url(it, "/prompt"), json=LONG, headers=headers, timeout=180) as got,
    ):
        assert got.status_code == 200
        for line in filter(None, got.iter_lines()):
            if not last:
                begun()
            last = line
    return last == "data: [DONE]"


@contextmanager
def streams(it: Cluster, number: int) -> Iterator[list[Future[bool]]]:
    """Yields long streams that have all begun, each of a conversation of its own."""
    with ThreadPoolExecutor(number) as threads:
        events = [Event() for _ in range(number)]
        started = [threads.submit(stream, it, each, event.set) for each, event in enumerate(events)]
        for event in events:
            assert event.wait(60)
        yield started


@contextmanager
def load(it: Cluster, clients: int = 4) -> Iterator[list[int | str]]:
    """Clients that send one short request after another; yields the list of their statuses."""
    statuses: list[int | str] = []
    stopped = Event()

    def ask(client: int) -> None:
        body = {"prompt": "a", "max_tokens": 8}
        with httpx.Client(headers=HEADERS, timeout=60) as http:
            while not stopped.is_set():
                try:
                    statuses.append(http.post(url(it, "/prompt"), json=body).status_code)
                except httpx.TransportError as error:
                    statuses.append(repr(error))

    with ThreadPoolExecutor(clients) as threads:
        for client in range(clients):
            threads.submit(ask, client)
        try:
            yield statuses
        finally:
            stopped.set()


def num_running(node: "subprocess.Popen[bytes]") -> int:
    """Requests that the replica on `node` computes now; it is asked on its own port."""
    for process, _, port in listening(node.pid):
        if process.name().startswith("ray::ServeReplica"):
            with suppress(httpx.TransportError):
                found = httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                if found.status_code == 200 and "engine" in found.text:
                    return int(found.json()["engine"]["running"])
    return 0


def lose(node: "subprocess.Popen[bytes]") -> None:
    """Kills every process of a node at once, as a machine that fails does."""
    gone = [psutil.Process(node.pid), *all_below(node.pid)]
    for process in gone:
        process.kill()
    psutil.wait_procs(gone)


def healthy(it: Cluster, number: int) -> bool:
    """Returns whether as many replicas as that are there and HAProxy answers."""
    return sum(len(replicas(node)) for node in it.nodes) == number and it.answers


@pytest.fixture
def two() -> Iterator[Cluster]:
    """A head without replicas, two workers, and a replica on each."""
    with cluster() as it:
        it.workers = [it.worker(), it.worker()]
        it.deploy(**DEPLOYMENT)
        until(lambda: healthy(it, 2), START_S)
        until(lambda: [len(replicas(each)) for each in it.workers] == [1, 1])
        yield it


def test_a_lost_node_costs_its_own_streams(two: Cluster) -> None:
    """Its streams break, all others come whole, later requests are answered, and a replica comes
    back on another node."""
    lost, _ = two.workers
    spare = two.worker()
    with streams(two, 8) as started:
        counts = [num_running(each) for each in two.workers]
        assert sum(counts) == 8
        assert min(counts) > 0
        lose(lost)
        whole = [each.result() for each in started]
    assert whole.count(False) == counts[0]
    until(lambda: len(replicas(spare)) == 1 and two.answers, START_S)
    with load(two) as statuses:
        until(lambda: len(statuses) > 50, 60)
    assert set(statuses) == {200}


def test_a_change_of_a_setting_fails_no_request(two: Cluster) -> None:
    """Serve replaces the replicas one by one while requests and streams go on."""
    before = pids(two)
    with streams(two, 4) as started, load(two) as statuses:
        two.deploy({"api": {"max_prompt_chars": 77}}, **DEPLOYMENT)
        until(lambda: healthy(two, 2) and not before & pids(two), START_S)
        assert all(each.result() for each in started)
    assert set(statuses) == {200}
    for session in map(str, range(8)):  # they meet both replicas
        headers = {**HEADERS, "x-session-id": session}
        too_long = httpx.post(url(two, "/prompt"), json={"prompt": "a" * 78}, headers=headers)
        assert too_long.status_code == 400


def test_replicas_come_with_load_and_go_without() -> None:
    """The second replica starts under load; when it ends again, every stream has come whole."""
    with cluster() as it:
        it.workers = [it.worker(), it.worker()]
        it.deploy(autoscaling_config=SCALING, graceful_shutdown_timeout_s=150)
        until(lambda: healthy(it, 1), START_S)
        with load(it, 12) as statuses, streams(it, 4) as started:
            until(lambda: healthy(it, 2), START_S)
            assert all(each.result() for each in started)
        until(lambda: healthy(it, 1), START_S)
        assert set(statuses) == {200}


def test_a_head_that_is_lost_takes_the_deployment_along() -> None:
    """Without external storage a new head has no state: the workers end, and `serve deploy`
    restores the deployment, as cluster/README.md says."""
    with cluster() as it:
        worker = it.worker()
        it.deploy(**DEPLOYMENT | {"num_replicas": 1})
        until(lambda: healthy(it, 1), START_S)
        lose(it.head)
        worker.wait(120)  # Ray gives a head 60 s to come back
        it.start_head()
        it.worker()
        it.deploy(**DEPLOYMENT | {"num_replicas": 1})
        until(lambda: healthy(it, 1), START_S)


@pytest.mark.skipif(not shutil.which("redis-server"), reason="needs Debian's redis-server")
def test_a_head_with_redis_comes_back_to_its_replicas(tmp_path: Path) -> None:
    """With Ray's state in Redis the replica lives on, with its model, and a new head answers."""
    with redis(tmp_path) as address, cluster(RAY_REDIS_ADDRESS=address) as it:
        it.worker()
        it.deploy(**DEPLOYMENT | {"num_replicas": 1})
        until(lambda: healthy(it, 1), START_S)
        before = pids(it)
        lose(it.head)
        it.start_head()
        until(lambda: it.answers, START_S)
        with load(it) as statuses:
            until(lambda: len(statuses) > 50, 60)
        assert set(statuses) == {200}
        assert pids(it) == before


@contextmanager
def redis(folder: Path) -> Iterator[str]:
    """A Redis server, and its address."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--dir", str(folder), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: process.poll() is not None or is_open(port))
            yield f"127.0.0.1:{port}"
        finally:
            process.kill()


def is_open(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def pids(it: Cluster) -> set[int]:
    """Returns the processes of the replicas."""
    titles = (descendants(node.pid) for node in it.nodes)
    return {pid for each in titles for pid, title in each.items() if REPLICA in title}
