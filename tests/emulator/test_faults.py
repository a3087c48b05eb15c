"""The emulator's faults, as seen by a plain HTTP client."""

from collections.abc import Iterator

import httpx
import pytest

from emulator import client_api, worker_api
from emulator.faults import HTML, LOST, NOT_JSON, RESET, Fault
from emulator.platform import Platform
from emulator.queue import Job
from tests.worker.conftest import Client, until

AS_WORKER = {"Authorization": worker_api.KEY}
AS_CLIENT = {"Authorization": f"Bearer {client_api.KEY}"}


@pytest.fixture
def http(platform: Platform) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{platform.url}/v2/ep", headers=AS_WORKER, timeout=10) as http:
        yield http


@pytest.fixture
def job(platform: Platform, http: httpx.Client) -> Job:
    """A job that the worker has taken."""
    job = Client(platform).submit({"prompt": "x"})
    assert take(http).json()["id"] == job.id
    return job


def take(http: httpx.Client, pod: str = "pod1") -> httpx.Response:
    return http.get(f"/job-take/{pod}")


def done(http: httpx.Client, job: Job, output: str = "y") -> httpx.Response:
    url = f"/job-done/pod1/{job.id}?isStream=true"
    return http.post(url, json={"output": [output]})


def test_statuses_come_in_order_and_are_counted(
    platform: Platform, http: httpx.Client, job: Job
) -> None:
    """Every injected fault is met once; a refused request changes no job."""
    platform.faults.inject("job-done", 500, 404)
    assert [done(http, job).status_code for _ in range(2)] == [500, 404]
    assert (job.status, job.num_results) == ("IN_PROGRESS", 0)
    assert done(http, job).status_code == 200
    assert (job.status, job.num_results) == ("COMPLETED", 1)
    assert platform.faults.num_faults["job-done"] == 2
    assert platform.faults.num_requests["job-done"] == 3
    assert platform.faults.num_planned == 0


def test_a_reset_connection_is_an_error_at_the_other_end(
    platform: Platform, http: httpx.Client, job: Job
) -> None:
    """RESET loses the result, and LOST only its acknowledgement."""
    platform.faults.inject("job-done", RESET, LOST)
    with pytest.raises(httpx.ReadError, match="reset"):
        done(http, job)
    assert not job.is_over
    with pytest.raises(httpx.ReadError, match="reset"):
        done(http, job)
    assert (job.status, job.num_results) == ("COMPLETED", 0)
    done(http, job)
    assert (job.num_results, job.num_late_posts) == (1, 1)


@pytest.mark.parametrize("fault", [204, 400, 429, 500, NOT_JSON, HTML])
def test_a_faulty_poll_keeps_the_job(
    platform: Platform, http: httpx.Client, fault: int | Fault
) -> None:
    """A poll that meets a fault takes no job from the queue."""
    job = Client(platform).submit({"prompt": "x"})
    platform.faults.inject("job-take", fault)
    status = fault if isinstance(fault, int) else fault.status
    assert take(http).status_code == status
    assert job.status == "IN_QUEUE"
    assert take(http).json()["id"] == job.id


def test_constant_faults_last_until_cleared(platform: Platform, http: httpx.Client) -> None:
    """A constant fault lasts until `clear`."""
    platform.faults.inject_always("job-take", 500)
    assert {take(http).status_code for _ in range(5)} == {500}
    platform.faults.clear()
    assert take(http).status_code == 204


def test_a_job_is_delivered_twice(platform: Platform, http: httpx.Client, job: Job) -> None:
    """A second delivery, while a job runs or after its end, changes nothing for the client."""
    platform.deliver_again(job)
    assert take(http).json()["id"] == job.id
    done(http, job)
    platform.deliver_again(job)
    assert take(http).json()["id"] == job.id
    assert (job.status, job.num_deliveries) == ("COMPLETED", 3)


def test_a_silent_worker_loses_its_jobs(platform: Platform, http: httpx.Client, job: Job) -> None:
    """The jobs of a silent worker go to another one, and time out when that is silent too."""
    platform.queue.silence_s = 0.05
    until(lambda: job.status == "IN_QUEUE")
    assert take(http, "pod2").json()["id"] == job.id
    until(lambda: job.status == "TIMED_OUT")


def test_an_unreachable_platform_comes_back(platform: Platform, http: httpx.Client) -> None:
    """Connections fail while the platform is unreachable; then the same URL answers again."""
    assert take(http).status_code == 204
    with platform.unreachable(), pytest.raises(httpx.TransportError):
        take(http)
    assert take(http).status_code == 204


@pytest.mark.parametrize("path", ["run", "runsync", "openai/v1/chat/completions"])
@pytest.mark.parametrize("body", ['{"input": ', "\xff", "[" * 100_000])
def test_malformed_bodies_are_refused(platform: Platform, path: str, body: str) -> None:
    """A client's broken JSON is a 400."""
    answer = httpx.post(f"{platform.url}/v2/ep/{path}", content=body, headers=AS_CLIENT)
    assert answer.status_code == 400
    assert not platform.queue.jobs


@pytest.mark.parametrize(("kind", "limit"), [("run", 10_000_000), ("runsync?wait=1", 20_000_000)])
def test_results_have_a_size_limit(
    platform: Platform, http: httpx.Client, kind: str, limit: int
) -> None:
    """`/runsync` has a larger limit than `/run`."""
    given = httpx.post(f"{platform.url}/v2/ep/{kind}", json={"input": {}}, headers=AS_CLIENT).json()
    job = platform.queue.jobs[given["id"]]
    take(http)
    assert done(http, job, "y" * limit).status_code == 400
    assert done(http, job, "y" * (limit - 100)).status_code == 200
