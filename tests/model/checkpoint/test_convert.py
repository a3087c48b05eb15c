"""Conversion: complete files or none, and a stopped conversion continues."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from serve_app.cli import progress
from serve_app.convert import main
from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.checkpoint import inspect
from serve_app.model.checkpoint.convert import convert
from serve_app.model.checkpoint.destination import converted_bytes
from serve_app.model.checkpoint.find import is_complete
from serve_app.model.quantization import Quantization
from serve_app.tiny import CHECKPOINT

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of five layers with the tiny model's tokenizer."""
    from tests.model.driver import random_oracle

    folder = tmp_path_factory.mktemp("source")
    random_oracle(num_hidden_layers=5, intermediate_size=128).save_pretrained(folder)
    for file in CHECKPOINT.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of a conversion that ran to its end."""
    folder = tmp_path_factory.mktemp("whole")
    convert(source, folder)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def sentence(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Returns the command's error: one line, exit code 1."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert said.endswith(".")
    return said


class Stopped(Exception):
    pass


def stop_after(count: int) -> Any:
    def progress(done: int, total: int, name: str) -> None:
        if done == count:
            raise Stopped

    return progress


def test_a_conversion_has_all_that_a_checkpoint_needs(
    source: Path, whole: dict[str, bytes]
) -> None:
    """Tokenizer files as they were, config.json but for the quantization, an index of all files."""
    weights = [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    for file in (*source.glob("tokenizer*"), source / "generation_config.json"):
        assert whole[file.name] == file.read_bytes()
    config = json.loads(whole["config.json"])
    assert config.pop("quantization_config")["quant_type"] == "nf4"
    assert config == json.loads((source / "config.json").read_text())
    assert sorted(set(json.loads(whole[INDEX])["weight_map"].values())) == weights
    assert not [name for name in whole if "partial" in name]


def test_a_stopped_conversion_goes_on(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A second run keeps complete files and writes the others; every byte is the same."""
    with pytest.raises(Stopped):
        convert(source, tmp_path, progress=stop_after(3))
    assert not is_complete(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert len(before) == 3
    reported: list[int] = []
    convert(source, tmp_path, progress=lambda done, total, name: reported.append(done))
    assert reported == [3, 4, 5, 6]
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path) == whole
    assert is_complete(tmp_path)


def test_a_killed_conversion_leaves_whole_files_only(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL at any moment: files with a final name are whole, and the next run completes them."""
    command = [
        sys.executable,
        "-m",
        "serve_app.convert",
        str(source),
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("2 of 6 files"):
                break
        running.send_signal(signal.SIGKILL)
    (tmp_path / ".model-00004-of-00006.safetensors.partial").write_bytes(b"half")
    written = [name for name in contents(tmp_path) if name.endswith(".safetensors")]
    assert len(written) >= 2
    assert [name for name in written if (tmp_path / name).read_bytes() != whole[name]] == []
    convert(source, tmp_path)
    assert contents(tmp_path) == whole


def test_a_disk_that_fills_up_leaves_nothing_half_written(source: Path, tmp_path: Path) -> None:
    """A write that fails in the middle is a sentence with the system's reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(ModelLoadFailed, match=r"cannot be written \(File too large\)"):
            convert(source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [name for name in contents(tmp_path) if "model" in name] == []


def test_files_of_another_source_are_made_again(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """A folder that holds another model's conversion, or another quantization, gets the new one,
    and is no checkpoint in between."""
    convert(source, tmp_path, Quantization("fp4", "nested"))
    with pytest.raises(Stopped):
        convert(source, tmp_path, progress=stop_after(2))
    assert not is_complete(tmp_path)
    convert(source, tmp_path)
    assert contents(tmp_path) == whole
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    os.utime(changed / "model.safetensors", ns=(1, 1))
    reported: list[int] = []
    convert(changed, tmp_path, progress=lambda done, total, name: reported.append(done))
    assert reported[0] == 0


def test_two_do_not_write_into_one_folder(source: Path, tmp_path: Path) -> None:
    """The second fails with a sentence that says to wait, and a retry may help."""

    def second(done: int, total: int, name: str) -> None:
        with pytest.raises(ModelLoadFailed, match="another process is converting") as caught:
            convert(source, tmp_path)
        assert caught.value.retry
        raise Stopped

    with pytest.raises(Stopped):
        convert(source, tmp_path, progress=second)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Found before anything is written, with both numbers; what is there already is not counted."""
    needed = converted_bytes(inspect(source), Quantization("nf4", "bfloat16"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 0, needed * 9 // 10))
    assert "GB are free" in sentence(capsys, source, tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []
    monkeypatch.undo()
    with pytest.raises(Stopped):
        convert(source, tmp_path, progress=stop_after(3))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed, 0, needed * 9 // 10))
    convert(source, tmp_path)
    assert is_complete(tmp_path)


def test_the_size_is_known_beforehand(source: Path, whole: dict[str, bytes]) -> None:
    """`converted_bytes` is the size of the written files without their headers."""
    written = sum(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    needed = converted_bytes(inspect(source), Quantization("nf4", "bfloat16"))
    assert needed < written < needed + 6 * 8192


def test_what_cannot_be_converted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A source that is not there, ones in 4 bits that are asked to be others, sizes that 4 bits
    cannot have, and a destination that holds another checkpoint."""
    from tests.model.checkpoint.bnb4_files import save_bnb4
    from tests.model.driver import random_oracle

    assert "no such folder" in sentence(capsys, tmp_path / "nowhere", tmp_path / "to")
    own, other = tmp_path / "own", tmp_path / "other"
    convert(source, own)
    assert "nf4 with bfloat16" in sentence(capsys, own, other, "--quantization", "fp4")
    oracle = random_oracle(intermediate_size=128)
    save_bnb4(oracle, tmp_path / "bnb4", compress_statistics=True)
    assert "nf4 with nested" in sentence(capsys, tmp_path / "bnb4", other, "--quantization", "fp4")
    random_oracle().save_pretrained(tmp_path / "odd")
    assert "`intermediate_size` (48)" in sentence(capsys, tmp_path / "odd", other)
    assert "another checkpoint" in sentence(capsys, source, tmp_path / "bnb4")
    assert "another checkpoint" in sentence(capsys, source, source)
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in sentence(capsys, source, file)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's options reach the checkpoint; without a terminal it prints a line per file."""
    arguments = [str(source), str(tmp_path), "--quantization", "fp4", "--absmax", "float32"]
    assert main(arguments) == 0
    assert inspect(tmp_path).quantization == Quantization("fp4", "float32")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "1 of 6 files: model-00001-of-00006.safetensors"
    assert lines[-1] == f"{tmp_path} is complete."


def test_a_terminal_gets_a_bar() -> None:
    """The bar shows how many files are done, and ends when all of them are."""
    primary, secondary = os.openpty()
    with open(secondary, "w") as terminal, redirect_stdout(terminal):
        with progress.files("Converting") as show:
            show(0, 4, "")
            show(4, 4, "d")
        said = ""
        while "4/4" not in said:  # a terminal hands over what it has so far
            said += os.read(primary, 1000).decode()
    os.close(primary)
    assert "Converting" in said
