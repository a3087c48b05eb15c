"""The metrics on Ray's port and the log lines of a server in a Ray cluster."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.observed import Observed, observed
from tests.cluster.prometheus import Prometheus, needs_prometheus, panels, prometheus
from tests.worker.conftest import until

RAYS_LABELS = {"application": "default", "deployment": "mixtral"}


@pytest.fixture(scope="module")
def server() -> Iterator[Observed]:
    with observed() as it:
        yield it


def series(text: str, prefix: str) -> dict[tuple[str, ...], float]:
    """Returns the values by name without `prefix`, and the labels that the server gives itself."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith(f"{prefix}mixtral_"):
                continue
            if prefix:
                assert sample.labels.items() >= RAYS_LABELS.items()
                assert sample.labels["replica"]
            own = {k: v for k, v in sample.labels.items() if k in OWN_LABELS and v}
            key = (sample.name.removeprefix(prefix), *(f"{k}={v}" for k, v in sorted(own.items())))
            found[key] = sample.value
    return found


OWN_LABELS = {"model_name", "status", "finish_reason", "code", "handler", "phase", "part", "le"}
WITHOUT_DATA = {"GPU memory A"}
"""A query of metrics that Ray has on a machine with a GPU alone."""
MAY_BE_ZERO = {"Running and waiting B", "Preemptions A"}
"""Queries whose value stays 0 under a load that does not fill the server."""
CHANGING = ("mixtral_event_loop_lag_seconds", "mixtral_http_requests")
"""Series that a scrape of `/metrics` and the passing time change."""


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_rays_port_has_every_series_of_the_replica(server: Observed) -> None:
    """Once idle, both ways show the same series with the same values, counters and buckets too."""
    body = {"prompt": "a", "max_tokens": 20}
    for _ in range(3):
        assert httpx.post(f"{server.url}/prompt", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{server.url}/prompt", json={"x": 1}).status_code == 400

    def both() -> list[dict[tuple[str, ...], float]]:
        texts = ((server.text("server"), ""), (server.text("ray"), "ray_"))
        return [
            {key: value for key, value in series(*it).items() if not key[0].startswith(CHANGING)}
            for it in texts
        ]

    def are_equal() -> bool:
        ours, rays = both()
        return ours == rays

    until(are_equal)
    ours = series(server.text("server"), "")
    assert (
        ours["mixtral_requests_total", "finish_reason=stop", "model_name=tiny"]
        + ours["mixtral_requests_total", "finish_reason=length", "model_name=tiny"]
        == 3
    )
    key = ("mixtral_http_requests_total", "handler=/prompt", "model_name=tiny")
    assert (ours[*key, "status=200"], ours[*key, "status=400"]) == (3, 1)
    until(lambda: (*key, "status=400") in series(server.text("ray"), "ray_"))


@pytest.mark.ray
def test_a_replica_writes_lines_of_json(server: Observed) -> None:
    """Our lines and Serve's have the same form; a request's line has its id, and no prompt."""
    given = {"x-request-id": "zebra-1"}
    body = {"prompt": "zebra crossing", "max_tokens": 1}
    response = httpx.post(f"{server.url}/prompt", json=body, headers=given, timeout=60)

    def ours() -> list[dict[str, object]]:
        return [line for line in server.log_lines() if line.get("client_request_id") == "zebra-1"]

    def is_served(line: dict[str, object]) -> bool:
        return line.get("logger") == "ray.serve" and line.get("route") == "/prompt"

    # Serve writes its line after the answer is sent.
    until(lambda: ours() != [] and any(map(is_served, server.log_lines())))
    assert ours()[0]["request_id"] == response.headers["x-mixtral-request-id"]
    lines = server.log_lines()
    assert lines[0]["message"] == "Started initializing replica."  # before our code runs
    (warm_up,) = (line for line in lines if line.get("phase") == "warm-up")
    assert isinstance(warm_up["seconds"], float)
    assert all("logger" in line for line in lines[1:])
    assert not any("crossing" in str(line) for line in lines)


@contextmanager
def load(url: str) -> Iterator[None]:
    """Runs four clients with a common prompt, until the block ends; one request in two is bad."""
    is_over = threading.Event()
    messages = [{"role": "user", "content": "Count to a hundred, one number at a time. " * 4}]
    good = {"messages": messages, "max_tokens": 60, "ignore_eos": True}

    def client() -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not is_over.is_set():
                for body, status in ((good, 200), (good | {"temperature": 9}, 400)):
                    assert http.post("/v1/chat/completions", json=body).status_code == status

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            yield
        finally:
            is_over.set()
            for each in clients:
                each.result()


def missing(prometheus: Prometheus) -> set[str]:
    """Returns the queries of the dashboard, by panel and letter, that have no data now."""
    found = set()
    for panel in panels():
        for target in panel["targets"]:
            values = prometheus.query(target["expr"])
            name = f"{panel['title']} {target['refId']}"
            is_shown = values != [] and not any(map(math.isnan, values))
            if not is_shown or (max(values) == 0 and name not in MAY_BE_ZERO):
                found.add(name)
    return found


@pytest.mark.ray
@pytest.mark.timeout(180)
@needs_prometheus
def test_every_panel_has_data(server: Observed, tmp_path: Path) -> None:
    """Under load each query of the dashboard has values, and no alert is pending or firing."""
    with prometheus(tmp_path, "ray", server.targets["ray"]) as it, load(server.url):
        until(lambda: missing(it) == WITHOUT_DATA)
        assert set(it.rules().values()) == {"inactive"}
