"""Downloads from the hub: the real client against a hub on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.hub import serve, sha
from tests.mounts import mounted_folder

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"the same weights again",
}


UNREAD = {"pytorch_model.bin", "consolidated.safetensors"}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with serve(FILES) as url:
        yield url


def find_in_process(
    hub: str,
    home: Path,
    name: str,
    revision: str = "main",
    token: str = "",
    free: int = 10**12,
    volume: Path | None = None,
) -> tuple[str, bool]:
    """Returns the folder, or the sentence of the error; and whether to try again."""
    code = (
        "import sys; from pathlib import Path; from serve_app.start_plan.hub import *\n"
        "import shutil; from types import SimpleNamespace as Usage\n"
        "name, revision, token, volume, free = sys.argv[1:]\n"
        "shutil.disk_usage = lambda path: Usage(free=int(free))\n"
        "try: print(find_checkpoint(name, revision, token=token or None, "
        "chosen_volume=volume), 0)\n"
        "except ModelLoadFailed as error: print(error.message, int(error.retry))"
    )
    arguments = [name, revision, token, str(volume or home / "absent"), str(free)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, retry = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    return answer, retry == "1"


@pytest.mark.parametrize("has_volume", [False, True])
def test_a_download_takes_only_what_is_read(hub: str, tmp_path: Path, has_volume: bool) -> None:
    """safetensors, JSON and tokenizer are downloaded, to the volume if any; pickles are not."""
    with mounted_folder() if has_volume else nullcontext(tmp_path / "no volume") as volume:
        (tmp_path / "no volume").mkdir()
        answer, _ = find_in_process(hub, tmp_path, "o/m", volume=volume)
        folder = Path(answer)
        wanted = set(FILES) - UNREAD
        assert {file.name for file in folder.iterdir()} == wanted
        assert (folder / "model.safetensors").read_bytes() == b"weights"
        assert folder.is_relative_to(volume) == has_volume
        # The second call sends no request.
        again = find_in_process("http://127.0.0.1:1", tmp_path, "o/m", volume=volume)
        assert again == (answer, False)


def test_a_volume_without_room_is_left_out(hub: str, tmp_path: Path) -> None:
    """The download goes to the container's disk where a small volume could not hold it."""
    with mounted_folder() as volume:
        code = (
            "import shutil, sys; from types import SimpleNamespace as Usage\n"
            "from serve_app.start_plan.hub import find_checkpoint\n"
            "free = lambda path: 9 if str(path).startswith(sys.argv[1]) else 1e12\n"
            "shutil.disk_usage = lambda path: Usage(free=free(path))\n"
            "print(find_checkpoint('o/m', chosen_volume=sys.argv[1]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(volume)],
            env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert Path(done.stdout.strip()).is_relative_to(tmp_path), done.stderr
        assert "The model is not kept on the volume: o/m: the download takes" in done.stderr


@pytest.mark.parametrize("begun", [0, 300_000])
def test_a_download_reports_progress(tmp_path: Path, begun: int) -> None:
    """Progress counts the missing bytes up to all of them, and those of an earlier try."""
    weights = bytes(1_000_000)
    small = {name: name.encode() for name in FILES if name != "config.json"}  # no two alike
    files = {**FILES, **small, "model.safetensors": weights}
    blobs = tmp_path / "hub" / "models--o--m" / "blobs"
    if begun:
        blobs.mkdir(parents=True)
        (blobs / f"{sha(weights)}.incomplete").write_bytes(weights[:begun])
    code = (
        "import json, sys; from serve_app.start_plan.hub import download, look_up\n"
        "told = []\n"
        "download(look_up('o/m', None, None, None), None, lambda *now: told.append(now))\n"
        "print(json.dumps(told))"
    )
    with serve(files) as url:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
    told = json.loads(done.stdout)
    shares = [share for share, _ in told]
    missing = sum(len(files[name]) for name in set(files) - {"config.json", *UNREAD})
    assert {size for _, size in told} == {missing}
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.parametrize(
    ("name", "revision", "words", "retry"),
    [
        ("o/gated", "main", "HF_TOKEN", False),
        ("nobody/nothing", "main", "no such repository", False),
        ("o/m", "v9", "no such revision", False),
        ("o/broken", "main", "check the network", True),
    ],
)
def test_an_error_of_the_hub_becomes_a_sentence(
    hub: str, tmp_path: Path, name: str, revision: str, words: str, retry: bool
) -> None:
    """The hub's answer decides the sentence, and whether to try again."""
    answer, again = find_in_process(hub, tmp_path, name, revision)
    assert answer.startswith(name)
    assert words in answer
    assert again == retry


def test_a_token_opens_a_gated_repository(hub: str, tmp_path: Path) -> None:
    """The token reaches the hub."""
    answer, _ = find_in_process(hub, tmp_path, "o/gated", token="good")
    assert (Path(answer) / "config.json").exists()


def test_no_network_is_worth_another_try(tmp_path: Path) -> None:
    """A hub that does not answer ends in a sentence with `retry`."""
    answer, again = find_in_process("http://127.0.0.1:1", tmp_path, "o/m")
    assert "check the network" in answer
    assert again


def test_a_wrong_token_is_named(hub: str, tmp_path: Path) -> None:
    """Trying again would not help."""
    answer, again = find_in_process(hub, tmp_path, "o/m", token="wrong")
    assert "HF_TOKEN" in answer
    assert not again


def test_too_little_disk_is_found_before_the_download(hub: str, tmp_path: Path) -> None:
    """Only missing files that are read are counted, and no weight is downloaded before."""
    needed = sum(len(FILES[name]) for name in set(FILES) - {"config.json", *UNREAD})
    answer, again = find_in_process(hub, tmp_path, "o/m", free=needed - 1)
    assert "GB are free" in answer
    assert not again
    assert not list(tmp_path.rglob("model.safetensors"))
    answer, _ = find_in_process(hub, tmp_path, "o/m", free=needed)
    assert (Path(answer) / "model.safetensors").exists()


@pytest.mark.parametrize(
    "lacking", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_repository_that_cannot_be_served_is_not_downloaded(tmp_path: Path, lacking: str) -> None:
    """The list of its files decides the refusal; the error names the missing one."""
    files = {name: data for name, data in FILES.items() if name != lacking}
    with serve(files) as url:
        answer, again = find_in_process(url, tmp_path, "o/m")
    assert answer.startswith("o/m: the repository has")
    assert lacking in answer
    assert not again
    assert not list(tmp_path.rglob("*.json"))
