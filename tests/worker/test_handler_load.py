"""The handler's answers before the model is loaded, and its posts during the load."""

from pathlib import Path

from serve_app.errors import ModelLoadFailed
from tests.exposition import Shown
from tests.worker.recorded import posts_of
from tests.worker.scripted_model import HandlerOf, Model


def test_health_is_answered_without_starting_the_model(handler_of: HandlerOf) -> None:
    """`/health` is idle before the first job, failed with a reason after it, else the model's."""
    cold = handler_of(ModelLoadFailed("No such checkpoint."))
    assert posts_of(cold, {"endpoint": "/health"}).output == {"status": "idle", "load": []}
    posts_of(cold, {"prompt": "x"})
    failed = {"status": "failed", "load": [], "reason": "No such checkpoint."}
    assert posts_of(cold, {"openai_route": "/health"}).output == [failed]
    warm = handler_of(
        Model(
            [{"status": 200, "body": {"text": ""}}], [{"status": 200, "body": {"status": "ready"}}]
        )
    )
    posts_of(warm, {"prompt": "x"})
    assert posts_of(warm, {"route": "/health"}).output == {"status": "ready"}
    posted = posts_of(cold, {"route": "/health", "method": "POST"}).error
    assert posted["status"] == "VALIDATION_FAILED"


def test_metrics_are_answered_without_starting_the_model(
    handler_of: HandlerOf,
) -> None:
    """`/metrics` has the worker's status before a model is ready, then the model's text."""
    cold = handler_of(ModelLoadFailed("No such checkpoint."))
    for given, status in (
        ({"route": "/metrics"}, "idle"),
        ({"openai_route": "/metrics"}, "failed"),
    ):
        output = posts_of(cold, given).output
        text = output[0] if "openai_route" in given else output
        assert Shown(text).by("status", "status") == {status: 1}
        posts_of(cold, {"prompt": "x"})
    warm = handler_of(
        Model([{"status": 200, "body": {"text": ""}}], [{"status": 200, "body": "# A text.\n"}])
    )
    posts_of(warm, {"prompt": "x"})
    assert posts_of(warm, {"endpoint": "/metrics"}).output == "# A text.\n"
    posted = posts_of(cold, {"route": "/metrics", "method": "POST"}).error
    assert posted["message"] == "/metrics takes GET, not POST."


def test_waiting_jobs_get_the_phases_of_the_load(handler_of: HandlerOf, tmp_path: Path) -> None:
    """A waiting job's first update has the status and the phases of the load."""
    (tmp_path / "load.jsonl").write_text('{"phase": "read", "state": "started", "at": 1}\n')
    posts = posts_of(handler_of(Model([{"status": 200, "body": {}}])), {"prompt": "x"})
    assert posts.updates[0] == {"status": "loading", "load": [], "phase": "read"}
