"""A worker with two replicas of the tiny model: which of them answers a job."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from emulator.platform import Platform
from emulator.worker import Worker
from tests.worker.conftest import TINY, Client, until

pytestmark = pytest.mark.ray
NUM_CONVERSATIONS = 8
NUM_ALIKE = 8


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker with two replicas."""
    home = tmp_path_factory.mktemp("home")
    config = yaml.safe_load(TINY.read_text())
    # A small part of a processor each, so that Ray starts two on any machine.
    two = {"name": "mixtral", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}}
    config["applications"][0]["deployments"] = [two]
    path = Path(home) / "two.yaml"
    path.write_text(yaml.safe_dump(config))
    with Platform() as platform, Worker(platform, home, SERVE_CONFIG=str(path)):
        yield Client(platform)


def completed(client: Client, prompt: str) -> Any:
    """Returns the answer to a completion."""
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True}
    return client.ended({"route": "/v1/completions", "body": body}).output


def num_running(client: Client) -> int:
    """Returns the number of requests that a replica computes now; each call asks any of the two."""
    return int(client.ended({"endpoint": "/health"}).output["engine"]["running"])


def test_a_conversation_stays_at_the_replica_that_has_its_prefix(client: Client) -> None:
    """The second turn of each of eight conversations finds its first turn in the prefix cache."""
    for number in range(NUM_CONVERSATIONS):
        turn = f"{number} is the number of this conversation. " * 8
        completed(client, turn)
        usage = completed(client, turn + "And then?")["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 2


def test_a_full_replica_passes_requests_on(client: Client) -> None:
    """Eight concurrent requests with the same beginning are distributed over both replicas.

    Their answers are long, so that all of them still run when the replicas are asked.
    """
    long = {"prompt": "the same", "max_tokens": 16_000, "ignore_eos": True, "stream": True}
    with client.platform.paused():
        jobs = [client.submit(long) for _ in range(NUM_ALIKE)]
    until(lambda: all(job.chunks for job in jobs))
    found = [num_running(client) for _ in range(12)]
    for job in jobs:
        client.cancel(job)
    until(lambda: all(job.is_over for job in jobs))
    assert 0 not in found
    assert NUM_ALIKE not in found
