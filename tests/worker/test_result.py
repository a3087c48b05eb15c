"""Results that the platform would refuse: too large, or no JSON."""

import asyncio
import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import Worker
from serve_app.errors import InternalError
from serve_app.worker.result import LargeResults, Result, encode, file_name
from tests.mounts import mounted_folder
from tests.settled import settled
from tests.worker.conftest import HEADERS, SCRIPT, Client

BIG = 25_000_000


@pytest.fixture(scope="module")
def volume() -> Iterator[Path]:
    with mounted_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def keeper(volume: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of a worker that writes large results to its volume."""
    home = tmp_path_factory.mktemp("home")
    arguments = ["--volume", str(volume)]
    with Platform() as platform, Worker(platform, home, script=SCRIPT, arguments=arguments) as w:
        yield Client(platform)
        settled(platform, w)


def test_an_answer_larger_than_a_chunk_arrives(scripted: Client) -> None:
    """An answer that is too large for a chunk is in the result alone."""
    job = scripted.ended({"prompt": "bytes 1500000"})
    assert (job.status, job.chunks) == ("COMPLETED", [])
    assert len(job.output["text"]) == 1_500_000


@pytest.mark.parametrize("stream", [False, True])
def test_a_result_that_is_too_large_is_an_error(scripted: Client, stream: bool) -> None:
    """25 MB fail with a message that has the limit; chunks were delivered before."""
    job = scripted.ended({"prompt": f"bytes {BIG}", "stream": stream})
    error = scripted.error_of(job)["error"]
    assert (error["code"], error["retry"]) == ("result_too_large", False)
    assert "10,000,000" in error["message"]
    assert sum(len(chunk["token"]) for chunk in job.chunks) == (BIG if stream else 0)


def runsync(platform: Platform, prompt: str) -> Job:
    url = f"{platform.url}/v2/ep/runsync"
    given = {"input": {"prompt": prompt}}
    answer = requests.post(url, json=given, headers=HEADERS, timeout=60).json()
    return platform.queue.jobs[answer["id"]]


def test_runsync_takes_more(scripted: Client) -> None:
    """A job of `/runsync` may have a result of 15 MB, but not of 25."""
    job = runsync(scripted.platform, "bytes 15000000")
    assert job.status == "COMPLETED", job.error
    job = runsync(scripted.platform, f"bytes {BIG}")
    assert "20,000,000" in scripted.error_of(job)["error"]["message"]


def test_a_413_is_an_error(scripted: Client) -> None:
    """A 413 turns the result into an error instead of being posted again."""
    scripted.platform.faults.inject("job-done", 413)
    job = scripted.ended({"prompt": "bytes 5000"})
    assert scripted.error_of(job)["error"]["code"] == "result_too_large"


@pytest.mark.parametrize("stream", [False, True])
def test_large_results_are_kept_on_the_volume(keeper: Client, volume: Path, stream: bool) -> None:
    """With `runpod.large_results: volume` the output names a file that has the output."""
    job = keeper.ended({"prompt": f"bytes {BIG}", "stream": stream})
    assert job.status == "COMPLETED", job.error
    kept = job.output[0] if stream else job.output
    path = Path(kept["file"])
    assert path == volume / "results" / f"{job.id}.json"
    assert path.stat().st_size == kept["bytes"]
    output = json.loads(path.read_text())
    text = "".join(part["token"] for part in output) if stream else output["text"]
    assert text == "x" * BIG


def test_a_volume_that_cannot_be_written_is_an_error(volume: Path, keeper: Client) -> None:
    """A volume that cannot be written makes the result an error, and leaves no partial file."""
    folder = volume / "results"
    folder.mkdir(exist_ok=True)
    before = sorted(folder.iterdir())
    blocked = volume / "kept"
    folder.rename(blocked)
    folder.write_text("in the way")
    try:
        job = keeper.ended({"prompt": f"bytes {BIG}"})
    finally:
        folder.unlink()
        blocked.rename(folder)
    assert keeper.error_of(job)["error"]["code"] == "result_too_large"
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("prompt", ["nan", "deep"])
def test_an_answer_that_is_no_json_is_an_error(scripted: Client, prompt: str) -> None:
    """An answer that is no JSON fails its job."""
    job = scripted.ended({"prompt": prompt})
    assert scripted.error_of(job)["error"]["code"] == "internal_error"


def test_no_volume_is_an_error(tmp_path: Path) -> None:
    """Without a mounted volume nothing is written: the file would be lost with the container. The
    error has the request's id."""
    results = LargeResults("volume", tmp_path)
    result = asyncio.run(results.replacement("job-1", "req-7", Result(b"[1]"), BIG))
    output = json.loads(result.body())["output"]
    assert json.loads(result.error or "")["error"]["request_id"] == "req-7"
    assert output["status"] == "VALIDATION_FAILED"
    assert f"no volume is mounted at {tmp_path}" in output["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("job_id", ["../up", "a/b", "/etc/x", ".hidden", "", "x" * 300, "\ud800"])
def test_no_id_leads_out_of_the_folder(job_id: str) -> None:
    """A job id that is no plain name is not used as a path."""
    with mounted_folder() as folder:
        results = LargeResults("volume", folder)
        result = asyncio.run(results.replacement(job_id, "req-7", Result(b"[1]"), BIG))
        kept = Path(json.loads(result.body())["output"]["file"])
        assert kept == folder / "results" / f"{file_name(job_id)}.json"
        assert [path.name for path in (folder / "results").iterdir()] == [kept.name]
        assert stat.S_ISREG(kept.stat().st_mode)


def test_lone_surrogates_are_replaced() -> None:
    """A lone surrogate, which UTF-8 does not have, becomes U+FFFD."""
    assert json.loads(encode({"a": ["x\ud800y", "ok 😀"]})) == {"a": ["x\ufffdy", "ok 😀"]}
    assert json.loads(encode("plain")) == "plain"


@pytest.mark.parametrize("value", [math.nan, [math.inf], object(), {"a": b"bytes"}])
def test_what_json_does_not_have_is_an_error(value: Any) -> None:
    """NaN, infinities and other objects raise; the SDK would post a bare NaN, or nothing."""
    with pytest.raises(InternalError):
        encode(value)
