"""The properties of the pinned SDK on which `serve_app.worker.sdk` relies."""

import inspect
import os
from typing import Any

import pytest

SIGNATURES = {
    "rp_job._job_get_url": "(batch_size=1)",
    "rp_job._job_stop_url": "()",
    "rp_scale.JobScaler.__init__": "(self, config)",
    "rp_scale.JobScaler.kill_worker": "(self)",
}


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "ERROR")  # read when the SDK is imported
    from runpod.serverless import worker
    from runpod.serverless.modules import rp_http, rp_job, rp_scale, worker_state

    return {
        "worker": worker,
        "rp_http": rp_http,
        "rp_job": rp_job,
        "rp_scale": rp_scale,
        "worker_state": worker_state,
    }


def part(modules: dict[str, Any], path: str) -> Any:
    module, *names = path.split(".")
    found = modules[module]
    for name in names:
        found = getattr(found, name)
    return found


def test_the_version_is_the_pinned_one() -> None:
    """The facts of this module are those of version 1.12.0."""
    from importlib.metadata import version

    assert version("runpod") == "1.12.0"


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures(modules: dict[str, Any], path: str) -> None:
    """Functions that are called or replaced have their known parameters."""
    signature = inspect.signature(part(modules, path))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    given = inspect.Signature(bare)
    assert str(given) == SIGNATURES[path]


def test_the_scaler_can_be_replaced(modules: dict[str, Any]) -> None:
    """The SDK looks up the class `JobScaler` when the worker runs."""
    run = inspect.getsource(modules["worker"].run_worker)
    assert "rp_scale.JobScaler(config)" in run


def test_urls_have_a_place_for_the_job(modules: dict[str, Any]) -> None:
    """The SDK replaces `$ID` and appends `isStream`, as our posts do."""
    source = inspect.getsource(modules["rp_http"]._handle_result)
    assert """url_template.replace("$ID", job["id"]) + f"&isStream={is_stream}\"""" in source


def test_a_scaler_has_what_is_replaced(modules: dict[str, Any]) -> None:
    """The fetchers of jobs and of stops, and the set that counts the jobs in flight."""
    scaler = modules["rp_scale"].JobScaler({})
    assert scaler.jobs_fetcher is modules["rp_job"].get_job
    assert scaler.stop_signals_fetcher is modules["rp_job"].get_stop_signals
    assert (scaler.jobs_fetcher_timeout, scaler.stop_signals_fetcher_timeout) == (90, 90)
    assert scaler.job_progress is modules["worker_state"].JobsProgress()
    before = scaler.current_occupancy()
    scaler.job_progress.add("a")
    assert scaler.current_occupancy() == before + 1
    scaler.job_progress.remove("a")
    assert scaler.current_occupancy() == before
    assert scaler.is_alive()
    scaler.kill_worker()
    assert not scaler.is_alive()


LOOPS = {
    # A signal reaches `kill_worker`, which is replaced.
    "handle_shutdown": "self.kill_worker()",
    # One poll at a time, for as many jobs as there are free slots, and none after the end.
    "get_jobs": """
        while self.is_alive():
            await self.set_scale()

            jobs_needed = self.current_concurrency - self.current_occupancy()
    """,
    # The loop over the SDK's own queue, which stays empty, ends at once.
    "run_jobs": "while self.is_alive() or not self.jobs_queue.empty():",
    # All three loops must end before the worker does.
    "run": "tasks = [jobtake_task, jobrun_task, jobstop_task]",
    # The fetcher of stops is called with the session.
    "monitor_stop_signals": "self.stop_signals_fetcher(session),",
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loops(modules: dict[str, Any], name: str) -> None:
    """The SDK's loop has the lines that draining relies on."""
    source = inspect.getsource(getattr(modules["rp_scale"].JobScaler, name))
    assert " ".join(LOOPS[name].split()) in " ".join(source.split())
