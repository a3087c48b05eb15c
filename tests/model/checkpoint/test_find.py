"""A model's name becomes a folder: given, cached anywhere, or downloaded by the real client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.find import cached_snapshot
from serve_app.start_plan.hub import find_checkpoint
from tests.model.checkpoint.hub import COMMIT, serve, sha


def make_snapshot(hub: Path, name: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A complete one-file checkpoint in the layout of the Hugging Face cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    """Nothing is looked up for a folder."""
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "mixtral", "a/b/c", "~/nowhere"])
def test_a_name_that_is_neither_is_refused(name: str) -> None:
    """A mistyped path is said to be missing, not asked of the hub."""
    with pytest.raises(ModelLoadFailed, match=r"no such folder") as caught:
        find_checkpoint(name)
    assert not caught.value.retry


def test_the_volume_is_searched_without_regard_to_case(tmp_path: Path) -> None:
    """RunPod's cache is lower-cased; the public name is not."""
    folder = make_snapshot(tmp_path / "huggingface-cache" / "hub", "MistralAI/mixtral-8x7B")
    assert find_checkpoint("mistralai/Mixtral-8x7B", volume=tmp_path) == folder


def test_a_revision_is_a_branch_or_a_commit(tmp_path: Path) -> None:
    """Refs resolve to their commits, commits to themselves, unknown ones to nothing."""
    main = make_snapshot(tmp_path, "o/m")
    other = make_snapshot(tmp_path, "o/m", "f" * 40, "dev")
    assert cached_snapshot(tmp_path, "o/m", None) == main
    assert cached_snapshot(tmp_path, "o/m", "main") == main
    assert cached_snapshot(tmp_path, "o/m", "dev") == other
    assert cached_snapshot(tmp_path, "o/m", "f" * 40) == other
    assert cached_snapshot(tmp_path, "o/m", "gone") is None
    assert cached_snapshot(tmp_path / "nowhere", "o/m", None) is None


def test_without_refs_only_a_single_snapshot_is_certain(tmp_path: Path) -> None:
    """One snapshot is the model; of two nobody knows which is the default branch."""
    only = make_snapshot(tmp_path, "o/m", ref=None)
    assert cached_snapshot(tmp_path, "o/m", None) == only
    make_snapshot(tmp_path, "o/m", "f" * 40, ref=None)
    assert cached_snapshot(tmp_path, "o/m", None) is None


def test_half_a_download_is_not_a_checkpoint(tmp_path: Path) -> None:
    """A snapshot that lacks a shard, its tokenizer or configuration, is passed over."""
    folder = make_snapshot(tmp_path, "o/m")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    assert cached_snapshot(tmp_path, "o/m", None) is None
    (folder / "model-2.safetensors").write_bytes(b"")
    assert cached_snapshot(tmp_path, "o/m", None) == folder
    (folder / "tokenizer.json").rename(folder / "tokenizer.part")
    assert cached_snapshot(tmp_path, "o/m", None) is None
    (folder / "tokenizer.part").rename(folder / "tokenizer.json")
    (folder / "config.json").unlink()
    assert cached_snapshot(tmp_path, "o/m", None) is None


# -- downloads: the real client against a hub on loopback ------------------------------------------

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
    hub: str, home: Path, name: str, revision: str = "main", token: str = "", free: int = 10**12
) -> tuple[str, bool]:
    """The folder found, or the refusal's sentence; and whether to try again."""
    code = (
        "import sys; from pathlib import Path; from serve_app.start_plan.hub import *\n"
        "import shutil; from types import SimpleNamespace as Usage\n"
        "name, revision, token, volume, free = sys.argv[1:]\n"
        "shutil.disk_usage = lambda path: Usage(free=int(free))\n"
        "try: print(find_checkpoint(name, revision, token=token or None, volume=Path(volume)), 0)\n"
        "except ModelLoadFailed as error: print(error.message, int(error.retry))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, revision, token, str(home / "volume"), str(free)],
        env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, retry = done.stdout.strip().splitlines()[-1].rsplit(" ", 1)
    return answer, retry == "1"


@pytest.mark.parametrize("has_volume", [False, True])
def test_a_download_takes_only_what_is_read(hub: str, tmp_path: Path, has_volume: bool) -> None:
    """safetensors, JSON and tokenizer come, pickles and second copies stay; volumes are used."""
    if has_volume:
        (tmp_path / "volume").mkdir()
    answer, _ = find_in_process(hub, tmp_path, "o/m")
    folder = Path(answer)
    wanted = set(FILES) - UNREAD
    assert {file.name for file in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert folder.is_relative_to(tmp_path / "volume") == has_volume
    # The second time nobody is asked.
    assert find_in_process("http://127.0.0.1:1", tmp_path, "o/m") == (answer, False)


@pytest.mark.parametrize("begun", [0, 300_000])
def test_a_download_tells_how_far_it_is(tmp_path: Path, begun: int) -> None:
    """In bytes of all that is missing, up to all of it; what an earlier try brought counts."""
    weights = bytes(1_000_000)
    small = {name: name.encode() for name in FILES if name != "config.json"}  # no two alike
    files = {**FILES, **small, "model.safetensors": weights}
    blobs = tmp_path / "hub" / "models--o--m" / "blobs"
    if begun:
        blobs.mkdir(parents=True)
        (blobs / f"{sha(weights)}.incomplete").write_bytes(weights[:begun])
    code = (
        "import json, sys; from serve_app.start_plan.hub import download\n"
        "told = []\n"
        "download('o/m', None, None, None, lambda share, size: told.append((share, size)))\n"
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
def test_a_refusal_of_the_hub_becomes_a_sentence(
    hub: str, tmp_path: Path, name: str, revision: str, words: str, retry: bool
) -> None:
    """What the hub says decides what to do about it, and whether to try again."""
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


def test_a_wrong_token_is_said(hub: str, tmp_path: Path) -> None:
    """Trying again would not help."""
    answer, again = find_in_process(hub, tmp_path, "o/m", token="wrong")
    assert "HF_TOKEN" in answer
    assert not again


def test_too_little_disk_is_found_before_the_download(hub: str, tmp_path: Path) -> None:
    """Only what is read and not there yet is counted, and no weight is fetched in vain."""
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
    """The list of its files is enough to refuse it, by the name of the one that it lacks."""
    files = {name: data for name, data in FILES.items() if name != lacking}
    with serve(files) as url:
        answer, again = find_in_process(url, tmp_path, "o/m")
    assert answer.startswith("o/m: the repository has")
    assert lacking in answer
    assert not again
    assert not list(tmp_path.rglob("*.json"))
