"""`model.cache_dir`: the first start writes a 4-bit copy, later starts read only the copy."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.cold_start.check import check_plan
from serve_app.config.settings import Settings
from serve_app.loading.load import Loaded, load
from serve_app.loading.load_log import LoadLog
from serve_app.model.checkpoint.convert import convert
from serve_app.start_plan.model_copy import copy_folder
from serve_app.start_plan.plan import plan_start
from serve_app.tiny import CHECKPOINT


def settings(name: Path, cache: Path, **model: Any) -> Settings:
    chosen = {"quantization": "nf4", "device": "cpu", "cache_dir": str(cache), **model}
    engine = {"kv_cache_tokens": 16384, "num_threads": 1}
    return Settings(model={"name": str(name), **chosen}, engine=engine)


def load_once(chosen: Settings, log: Path) -> tuple[Loaded, list[str]]:
    """Returns the load and its phases; the engine is stopped again."""
    loaded = load(chosen, LoadLog(str(log)))
    loaded.engine.stop()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return loaded, [line["phase"] for line in lines if line["state"] == "started"]


def checked(chosen: Settings) -> list[str]:
    """Returns the lines that the check prints about the start."""
    return check_plan(chosen, plan_start(chosen))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))


def test_the_second_start_reads_the_copy(source: Path, tmp_path: Path) -> None:
    """Only the first start has the phase copy; later starts do not read the original."""
    chosen = settings(source, tmp_path / "cache")
    first, phases = load_once(chosen, tmp_path / "first")
    assert phases == ["device", "resolve", "copy", "tokenizer", "read", "warm-up", "first token"]
    assert any("4-bit copy for later starts" in note for note in first.notes)
    for file in source.iterdir():
        stat = file.stat()
        file.write_bytes(bytes(stat.st_size))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second, phases = load_once(chosen, tmp_path / "second")
    assert phases == ["device", "resolve", "tokenizer", "read", "warm-up", "first token"]
    assert second.memory == first.memory
    assert any("of fused weights" in line for line in checked(chosen))


def test_a_copy_is_for_the_settings_that_made_it(source: Path, tmp_path: Path) -> None:
    """Another quantization gets another copy, and floats get none."""
    cache = tmp_path / "cache"
    _, phases = load_once(settings(source, cache), tmp_path / "nf4")
    assert "copy" in phases
    _, phases = load_once(settings(source, cache, quantization="fp4"), tmp_path / "fp4")
    assert "copy" in phases
    assert len(list(cache.iterdir())) == 2
    _, phases = load_once(settings(source, cache, quantization="none"), tmp_path / "none")
    assert "copy" not in phases
    assert len(list(cache.iterdir())) == 2


def test_a_copy_that_another_process_is_writing_is_not_waited_for(
    source: Path, tmp_path: Path
) -> None:
    """This start reads the original, and has a note about it."""
    chosen = settings(source, tmp_path / "cache")
    folder = copy_folder(chosen.model)
    assert folder is not None
    loads: list[Loaded] = []

    def meanwhile(done: int, total: int, name: str) -> None:
        if not loads:
            loads.append(load_once(chosen, tmp_path / "log")[0])

    convert(source, folder, progress=meanwhile)
    assert any("another process is converting" in note for note in loads[0].notes)


def test_our_own_form_is_not_copied(source: Path, tmp_path: Path) -> None:
    """A fused checkpoint is what the copy would be."""
    convert(source, tmp_path / "own")
    chosen = settings(tmp_path / "own", tmp_path / "cache")
    load_once(chosen, tmp_path / "log")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_replaced_files_get_another_copy(source: Path, tmp_path: Path, file: str) -> None:
    """A start never reads a copy of files that were replaced since."""
    chosen = settings(source, tmp_path / "cache")
    before = copy_folder(chosen.model)
    assert copy_folder(chosen.model) == before
    os.utime(source / file, (1, 1))
    assert copy_folder(chosen.model) != before


def test_names_that_look_alike(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder has one copy, however its path is written; other names have other copies."""
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    inner = tmp_path / str(source).strip("/")
    shutil.copytree(source, inner)
    names = (str(source), str(source).strip("/"), "a/b--c", "a--b/c")
    assert len({copy_folder(settings(Path(name), cache).model) for name in names}) == 4
    again = settings(tmp_path / "x" / ".." / "source", cache)
    assert copy_folder(again.model) == copy_folder(settings(source, cache).model)
    assert copy_folder(again.model) == copy_folder(settings(Path("source"), cache).model)


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    """The model loads without a copy, and a note says why."""
    (tmp_path / "file").write_text("")
    chosen = settings(source, tmp_path / "file" / "cache")
    loaded, phases = load_once(chosen, tmp_path / "log")
    assert "copy" not in phases
    (note,) = [note for note in loaded.notes if "no 4-bit copy is kept" in note]
    assert f"`model.cache_dir`: {tmp_path / 'file'} cannot be written by user" in note
    convert(source, tmp_path / "own")  # a fused checkpoint is not copied
    checked(settings(tmp_path / "own", tmp_path / "file" / "cache"))


def test_a_cache_on_a_volume_that_is_not_mounted(source: Path, tmp_path: Path) -> None:
    """A copy that would be lost with the container is not written."""
    chosen = settings(source, tmp_path / "volume" / "cache")
    runpod = chosen.runpod.model_copy(update={"volume": str(tmp_path / "volume")})
    (tmp_path / "volume").mkdir()
    plan = plan_start(chosen.model_copy(update={"runpod": runpod}))
    assert plan.copy_folder is None
    assert any(f"no volume is mounted at {tmp_path / 'volume'}" in note for note in plan.notes)


def test_a_copy_that_fails_ends_no_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is too small for the copy: the original is loaded, and a note says why."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    loaded, phases = load_once(settings(source, tmp_path / "cache"), tmp_path / "log")
    assert "copy" in phases
    assert any("there is no 4-bit copy" in note for note in loaded.notes)
