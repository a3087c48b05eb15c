"""A model's name becomes a folder on this machine: the given one, or one in a cache."""

import json
from pathlib import Path

import pytest

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.find import cached_snapshot, find_local
from tests.hub import COMMIT


def make_snapshot(hub: Path, name: str, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """Returns a complete one-file checkpoint in the layout of the Hugging Face cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    if ref:
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


def test_a_local_folder_is_itself(tmp_path: Path) -> None:
    """Nothing is looked up for a folder."""
    assert find_local(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "mixtral", "a/b/c", "~/nowhere"])
def test_a_name_that_is_neither_is_refused(name: str) -> None:
    """A mistyped path is reported as missing and is not looked up on the hub."""
    with pytest.raises(ModelLoadFailed, match=r"no such folder") as caught:
        find_local(name)
    assert not caught.value.retry


def test_the_volume_is_searched_without_regard_to_case(tmp_path: Path) -> None:
    """A name with capitals finds RunPod's cache, which has names in lower case."""
    folder = make_snapshot(tmp_path / "huggingface-cache" / "hub", "MistralAI/mixtral-8x7B")
    assert find_local("mistralai/Mixtral-8x7B", volume=tmp_path) == folder


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
    """Without refs, a single snapshot is used; with two, the default branch is unknown, so none is
    used."""
    only = make_snapshot(tmp_path, "o/m", ref=None)
    assert cached_snapshot(tmp_path, "o/m", None) == only
    make_snapshot(tmp_path, "o/m", "f" * 40, ref=None)
    assert cached_snapshot(tmp_path, "o/m", None) is None


def test_half_a_download_is_not_a_checkpoint(tmp_path: Path) -> None:
    """A snapshot that lacks a shard, its tokenizer or configuration, is passed over."""
    folder = make_snapshot(tmp_path, "o/m")
    (folder / "model.safetensors").unlink()  # it would be whole without any shard
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    assert cached_snapshot(tmp_path, "o/m", None) is None
    (folder / "model-2.safetensors").write_bytes(b"")
    assert cached_snapshot(tmp_path, "o/m", None) == folder
    (folder / "tokenizer.json").rename(folder / "tokenizer.part")
    assert cached_snapshot(tmp_path, "o/m", None) is None
    (folder / "tokenizer.part").rename(folder / "tokenizer.model")  # serves as well
    assert cached_snapshot(tmp_path, "o/m", None) == folder
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).rename(folder / "kept.part")
        assert cached_snapshot(tmp_path, "o/m", None) is None
        (folder / "kept.part").rename(folder / name)
