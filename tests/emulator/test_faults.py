"""The loopback platform's faults, as a plain HTTP client meets them."""

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
def platform() -> Iterator[Platform]:
    with Platform() as platform:
        platform.queue.hold_s = 0.1
        yield platform


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
    """Each planned fault is met once; what was refused is not recorded."""
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
    """RESET loses the result, LOST its acknowledgement alone."""
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
def test_a_bad_take_keeps_the_job(
    platform: Platform, http: httpx.Client, fault: int | Fault
) -> None:
    """A poll that is answered wrongly hands nothing out."""
    job = Client(platform).submit({"prompt": "x"})
    platform.faults.inject("job-take", fault)
    status = fault if isinstance(fault, int) else fault.status
    assert take(http).status_code == status
    assert job.status == "IN_QUEUE"
    assert take(http).json()["id"] == job.id


def test_constant_faults_last_until_cleared(platform: Platform, http: httpx.Client) -> None:
    """One that nobody can wait out, such as a platform that is down."""
    platform.faults.inject_always("job-take", 500)
    assert {take(http).status_code for _ in range(5)} == {500}
    platform.faults.clear()
    assert take(http).status_code == 204


def test_a_job_is_delivered_twice(platform: Platform, http: httpx.Client, job: Job) -> None:
    """While it runs and after it has ended; neither changes what the client sees."""
    platform.deliver_again(job)
    assert take(http).json()["id"] == job.id
    done(http, job)
    platform.deliver_again(job)
    assert take(http).json()["id"] == job.id
    assert (job.status, job.num_deliveries) == ("COMPLETED", 3)


def test_a_silent_worker_loses_its_jobs(platform: Platform, http: httpx.Client, job: Job) -> None:
    """They wait for another worker; when that one falls silent too, they are over."""
    platform.queue.silence_s = 0.05
    until(lambda: job.status == "IN_QUEUE")
    assert take(http, "pod2").json()["id"] == job.id
    until(lambda: job.status == "TIMED_OUT")


def test_a_platform_that_hangs_up_comes_back(platform: Platform, http: httpx.Client) -> None:
    """Open connections and new ones fail, then the same address answers again."""
    assert take(http).status_code == 204
    with platform.unreachable(), pytest.raises(httpx.TransportError):
        take(http)
    assert take(http).status_code == 204


@pytest.mark.parametrize("path", ["run", "runsync", "openai/v1/chat/completions"])
@pytest.mark.parametrize("body", ['{"input": ', "\xff", "[" * 100_000])
def test_malformed_bodies_are_refused(platform: Platform, path: str, body: str) -> None:
    """A client's broken JSON is a 400, not the platform's own failure."""
    answer = httpx.post(f"{platform.url}/v2/ep/{path}", content=body, headers=AS_CLIENT)
    assert answer.status_code == 400
    assert not platform.queue.jobs


@pytest.mark.parametrize(("kind", "limit"), [("run", 10_000_000), ("runsync?wait=1", 20_000_000)])
def test_results_have_a_size_limit(
    platform: Platform, http: httpx.Client, kind: str, limit: int
) -> None:
    """One for `/run` and a larger one for `/runsync`."""
    given = httpx.post(f"{platform.url}/v2/ep/{kind}", json={"input": {}}, headers=AS_CLIENT).json()
    job = platform.queue.jobs[given["id"]]
    take(http)
    assert done(http, job, "y" * limit).status_code == 400
    assert done(http, job, "y" * (limit - 100)).status_code == 200
