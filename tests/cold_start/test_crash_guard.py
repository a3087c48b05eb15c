"""After three loads that failed alike a fourth is refused; what the records on the volume keep."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.cold_start import crash_guard
from serve_app.cold_start.crash_guard import PAUSE_S, CrashGuard
from serve_app.cold_start.load_records import KILLED, STALE_S
from serve_app.config.settings import Settings
from serve_app.errors import LoaderKilled, ModelLoadFailed
from serve_app.start_plan.plan import plan_start
from serve_app.tiny import CHECKPOINT
from tests.mounts import mounted_folder
from tests.worker.process import ENTRY

SHORT = f"{KILLED} while it loaded, usually for lack of memory."
CUT_OFF = "model.safetensors: is damaged (it has 5 bytes)."


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Replaces pytest's: the volume of these tests, as records are kept on a mount alone."""
    with mounted_folder() as folder:
        yield folder


def settings(volume: Path, **model: Any) -> Settings:
    return Settings.from_args(
        {"model": {"name": "tiny", **model}, "runpod": {"volume": str(volume)}}, "test"
    )


def load(chosen: Settings, error: BaseException | None = None) -> None:
    """Loads as one process does; fails with `error`, if any."""
    with CrashGuard(chosen, None).watch():
        if error is not None:
            raise error


def fail(
    chosen: Settings,
    message: str = CUT_OFF,
    *,
    retry: bool = False,
    kind: type[ModelLoadFailed] = ModelLoadFailed,
) -> None:
    with pytest.raises(kind, match=message.partition("(")[0]):
        load(chosen, kind(message, retry=retry))


def records(volume: Path) -> list[Path]:
    return sorted(volume.glob(f"{crash_guard.FOLDER}/*/*.json"))


def test_the_fourth_load_is_not_tried(tmp_path: Path) -> None:
    """The refusal is one sentence: the cause, the decision, and what ends it. It is not retried."""
    chosen = settings(tmp_path)
    for size in (5, 77, 123):  # figures in a cause are no other cause
        fail(chosen, f"model.safetensors: is damaged (it has {size} bytes).")
    for _ in range(2):
        with pytest.raises(ModelLoadFailed) as refused:
            load(chosen)
        folder = records(tmp_path)[0].parent
        assert refused.value.message == (
            "model.safetensors: is damaged (it has 123 bytes); the last 3 loads failed for this "
            f"reason; none is tried until the model's settings change or {folder} is removed."
        )
        assert refused.value.retry is False
    assert len(records(tmp_path)) == 3
    load(settings(tmp_path, quantization="none"))
    with pytest.raises(ModelLoadFailed, match="the last 3 loads failed for this reason"):
        load(chosen)
    for record in records(tmp_path):
        record.unlink()
    load(chosen)


def test_other_causes_and_successes_count_anew(tmp_path: Path) -> None:
    """Only the same cause three times in a row refuses a load."""
    chosen = settings(tmp_path)
    fail(chosen)
    fail(chosen)
    fail(chosen, "config.json: is missing.")
    fail(chosen)
    fail(chosen)
    load(chosen)
    assert records(tmp_path) == []
    fail(chosen)
    fail(chosen)
    load(chosen)


def test_a_process_counts_once(tmp_path: Path) -> None:
    """Several tries of one worker are one record."""
    guard = CrashGuard(settings(tmp_path), None)
    for _ in range(5):
        with pytest.raises(ModelLoadFailed, match="lost"), guard.watch():
            raise ModelLoadFailed("The network is lost.", retry=True)
    assert len(records(tmp_path)) == 1


def test_a_load_that_is_stopped_is_no_failure(tmp_path: Path) -> None:
    """A worker that is stopped while it loads leaves no record, in both ways to load."""
    chosen = settings(tmp_path)
    with pytest.raises(SystemExit):
        load(chosen, SystemExit(0))

    async def scenario() -> None:
        begun = asyncio.Event()

        async def go_on_for_ever() -> None:
            begun.set()
            await asyncio.Event().wait()

        loading = asyncio.create_task(CrashGuard(chosen, None).around(go_on_for_ever))
        await begun.wait()
        assert len(records(tmp_path)) == 1
        loading.cancel()
        await asyncio.wait({loading})

    asyncio.run(scenario())
    assert records(tmp_path) == []


def test_what_may_pass_is_tried_again_later(tmp_path: Path) -> None:
    """A lost network refuses loads for ten minutes only, and its error has `retry` true."""
    chosen = settings(tmp_path)
    for _ in range(3):
        fail(chosen, "The hub cannot be reached.", retry=True)
    with pytest.raises(ModelLoadFailed, match="none is tried for 10 minutes") as refused:
        load(chosen)
    assert refused.value.retry is True
    for record in records(tmp_path):
        then = record.stat().st_mtime - PAUSE_S - 1
        os.utime(record, (then, then))
    load(chosen)


LOADING = """
import sys, time
from serve_app.config.settings import Settings
from serve_app.cold_start.crash_guard import CrashGuard
args = {"model": {"name": "tiny"}, "runpod": {"volume": sys.argv[1]}}
with CrashGuard(Settings.from_args(args, "test"), None).watch():
    print("loading", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def loading(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that loads for a long time."""
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    with subprocess.Popen(command, cwd=ENTRY.parent, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        yield process
        process.kill()


def test_a_process_that_is_killed_counts(tmp_path: Path, loading: subprocess.Popen[str]) -> None:
    """A record that says loading counts once its process is dead, and not before."""
    chosen = settings(tmp_path)
    fail(chosen, SHORT, retry=True, kind=LoaderKilled)
    fail(chosen, SHORT, retry=True, kind=LoaderKilled)
    # By name the last: it began after this process's own, of which there must be a third.
    (alive,) = [file for file in records(tmp_path) if f"-{loading.pid}." in file.name]
    load(chosen)
    assert records(tmp_path) == [alive]
    fail(chosen, SHORT, retry=True, kind=LoaderKilled)
    fail(chosen, SHORT, retry=True, kind=LoaderKilled)
    loading.send_signal(signal.SIGKILL)
    loading.wait()
    with pytest.raises(ModelLoadFailed, match="was killed while it loaded") as refused:
        load(chosen)
    assert refused.value.retry is False


def test_a_silent_worker_on_another_machine_is_gone(tmp_path: Path) -> None:
    """A process on another machine cannot be checked, so it must touch its file regularly."""
    chosen = settings(tmp_path)
    fail(chosen, SHORT)
    fail(chosen, SHORT)
    (elsewhere,) = records(tmp_path)[1:]
    record = json.loads(elsewhere.read_text())
    elsewhere.write_text(json.dumps({**record, "state": "loading", "host": "another"}))
    fail(chosen, SHORT)  # the second, as the one elsewhere still loads
    then = elsewhere.stat().st_mtime - STALE_S - 1
    os.utime(elsewhere, (then, then))
    with pytest.raises(ModelLoadFailed, match="none is tried"):
        load(chosen)


def test_the_models_files_are_part_of_it(tmp_path: Path) -> None:
    """A repaired checkpoint, or another revision, is loaded again."""
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "model")
    chosen = settings(tmp_path, name=str(checkpoint), device="cpu")
    before = crash_guard.fingerprint(chosen, plan_start(chosen))
    assert crash_guard.fingerprint(chosen, plan_start(chosen)) == before
    with (checkpoint / "config.json").open("a") as file:
        file.write(" ")
    plan = plan_start(chosen)
    repaired = crash_guard.fingerprint(chosen, plan)
    assert repaired != before
    model = chosen.model.model_copy(update={"revision": "v2"})
    another = chosen.model_copy(update={"model": model})
    assert crash_guard.fingerprint(another, plan) != repaired


def test_without_a_volume_nothing_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A missing volume is silent, an unwritable one is logged, and the load continues."""
    for _ in range(4):
        fail(settings(tmp_path / "absent"))
    assert caplog.text == ""
    for _ in range(4):
        fail(settings(Path("/proc")))
    assert "recorded on the volume" in caplog.text


def test_foreign_files_are_ignored(tmp_path: Path) -> None:
    """A truncated record and a foreign JSON file are ignored."""
    chosen = settings(tmp_path)
    fail(chosen)
    folder = records(tmp_path)[0].parent
    (folder / "0.json").write_text('{"state": "lo')
    (folder / "1.json").write_text("[]")
    fail(chosen)
    fail(chosen)
    with pytest.raises(ModelLoadFailed, match="the last 3 loads failed"):
        load(chosen)
