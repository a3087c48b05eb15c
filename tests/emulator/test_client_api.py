"""The routes for clients, as RunPod documents them."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from emulator import client_api, webhook, worker_api
from emulator.platform import Platform
from emulator.policy import Policy
from tests.worker.conftest import Client, until


@pytest.fixture
def http(platform: Platform) -> Iterator[httpx.Client]:
    """A client with RunPod's bare key, as its documentation shows."""
    headers = {"authorization": client_api.KEY}
    with httpx.Client(base_url=f"{platform.url}/v2/ep", headers=headers, timeout=10) as http:
        yield http


def worker(platform: Platform, path: str) -> httpx.Response:
    """Returns a worker's poll."""
    headers = {"Authorization": worker_api.KEY}
    return httpx.get(f"{platform.url}/v2/ep/{path}/pod1", headers=headers, timeout=10)


@pytest.mark.parametrize(
    ("key", "status"),
    [(client_api.KEY, 200), (f"Bearer {client_api.KEY}", 200), ("Bearer other", 401), ("", 401)],
)
def test_the_key_is_sent_with_or_without_bearer(platform: Platform, key: str, status: int) -> None:
    """Both forms of the header that RunPod's pages show are accepted."""
    answer = httpx.get(f"{platform.url}/v2/ep/health", headers={"authorization": key})
    assert answer.status_code == status


def test_purging_removes_the_jobs_that_wait(platform: Platform, http: httpx.Client) -> None:
    """Jobs that wait are removed and counted; a running one goes on."""
    jobs = [Client(platform).submit({"prompt": "x"}) for _ in range(3)]
    assert worker(platform, "job-take").json()["id"] == jobs[0].id
    assert http.post("/purge-queue").json() == {"removed": 2, "status": "completed"}
    assert [job.status for job in jobs] == ["IN_PROGRESS", "CANCELLED", "CANCELLED"]
    assert worker(platform, "job-take").status_code == 204


def test_a_job_shows_its_worker_and_is_listed(platform: Platform, http: httpx.Client) -> None:
    """`/status` has the id of the worker that took the job; `/requests` lists all jobs."""
    job = Client(platform).submit({"prompt": "x"})
    assert "workerId" not in http.get(f"/status/{job.id}").json()
    worker(platform, "job-take")
    shown = http.get(f"/status/{job.id}").json()
    assert (shown["workerId"], shown["status"]) == ("pod1", "IN_PROGRESS")
    assert [each["id"] for each in http.get("/requests").json()["requests"]] == [job.id]
    assert http.get("/health").json()["workers"] == {"idle": 0, "running": 1}


def test_a_job_that_runs_too_long_times_out(platform: Platform, http: httpx.Client) -> None:
    """After the execution timeout a job is TIMED_OUT, its worker is stopped, and it can be
    retried."""
    platform.queue.policy = Policy(execution_timeout_s=0.05)
    job = Client(platform).submit({"prompt": "x"})
    worker(platform, "job-take")
    until(lambda: job.status == "TIMED_OUT")
    assert worker(platform, "job-stop").json() == {"jobsToStop": [job.id]}
    assert http.post(f"/retry/{job.id}").json() == {"id": job.id, "status": "IN_QUEUE"}
    assert http.get("/health").json()["jobs"]["retried"] == 1


def test_a_job_outlives_its_ttl_nowhere(platform: Platform, http: httpx.Client) -> None:
    """After its time to live a job that waits is TIMED_OUT, and a running one is deleted."""
    running = Client(platform).submit({"prompt": "x"})
    assert worker(platform, "job-take").json()["id"] == running.id
    waiting = Client(platform).submit({"prompt": "x"})
    running.policy = waiting.policy = Policy(ttl_s=0.01)
    until(lambda: waiting.status == "TIMED_OUT")
    assert http.get(f"/status/{running.id}").status_code == 404
    assert worker(platform, "job-stop").json() == {"jobsToStop": [running.id]}


def test_a_request_sets_its_own_limits(platform: Platform, http: httpx.Client) -> None:
    """`policy` of a request replaces the endpoint's limits; a value out of range is refused."""
    limits = {"executionTimeout": 900_000, "ttl": 3_600_000, "lowPriority": False}
    given = http.post("/run", json={"input": {}, "policy": limits}).json()
    assert platform.queue.jobs[given["id"]].policy == Policy(900.0, 3600.0)
    for wrong in ({"executionTimeout": 4999}, {"ttl": 9999}, {"ttl": "1 h"}, [1]):
        assert http.post("/run", json={"input": {}, "policy": wrong}).status_code == 400


def test_a_webhook_gets_the_ended_job(
    platform: Platform, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The webhook gets what `/status` shows, again until it answers 200."""
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    posted: list[Any] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(500 if len(posted) == 1 else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        job = Client(platform).post({"input": {"prompt": "x"}, "webhook": url})
        Client(platform).cancel(job)
        until(lambda: len(posted) == 2)
        server.shutdown()
    assert posted[0] == posted[1] == http.get(f"/status/{job.id}").json()
    assert posted[0]["status"] == "CANCELLED"
