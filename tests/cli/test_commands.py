"""The command `mixtral-serve`: what it prints, its exit codes, and what it imports."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from serve_app.cli.commands import main
from serve_app.config import named
from serve_app.tiny import CHECKPOINT
from tests.settled import left_behind
from tests.worker.conftest import until
from tools.server_process import free_port

CODE = "import sys; from serve_app.cli.commands import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", CODE]


def test_check_takes_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration of the package needs no path."""
    assert main(["check", "tiny"]) == 0
    assert "context 16,384 tokens" in capsys.readouterr().out


def test_a_name_that_is_none_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence lists the names; the exit code is 1."""
    assert main(["run", "tinny"]) == 1
    assert capsys.readouterr().err == (
        "There is no configuration 'tinny'; use local, runpod, tiny, tiny-nf4, or a YAML file's "
        "path.\n"
    )


def test_a_wrong_setting_is_one_sentence(tmp_path: Path) -> None:
    """Ray starts while `run` checks; a configuration that is refused ends it again."""
    document = yaml.safe_load(named.find("tiny").read_text())
    document["applications"][0]["args"]["engine"] = {"max_runing": 3}
    document["http_options"]["port"] = free_port()
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [*COMMAND, "run", "wrong.yaml"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "wrong.yaml: `engine.max_runing` is not a setting.\n"
    until(lambda: not left_behind(tmp_path))


def test_a_usage_error_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A missing argument exits with code 2, as command lines do, and is named."""
    assert main(["convert"]) == 2
    assert "Missing argument 'SRC'" in capsys.readouterr().err


def test_the_names_are_the_files_of_configs() -> None:
    """What the package brings along is what the repository shows at its top."""
    shown = {file.stem: file.read_text() for file in Path("configs").glob("*.yaml")}
    assert {name: named.find(name).read_text() for name in named.names()} == shown


def test_the_command_imports_nothing_large() -> None:
    """`--help` loads no library that takes long to import."""
    code = "import serve_app.cli.commands, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"ray", "torch", "transformers", "pydantic", "httpx", "yaml", "numpy"}
    assert heavy.isdisjoint(json.loads(done.stdout))


def test_convert_prints_a_line_per_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal, `convert` prints lines in place of a bar; the result is complete."""
    assert main(["convert", str(CHECKPOINT), str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("5 of 5 files")
    assert lines[-1] == f"{tmp_path}/out: is complete."
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_serves_where_the_yaml_says(tmp_path: Path, number: signal.Signals) -> None:
    """`http_options` decide the address; a signal ends it with exit code 0 and leaves nothing."""
    document = yaml.safe_load(named.find("tiny").read_text())
    port = free_port()
    document["http_options"] = {"host": "127.0.0.1", "port": port}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(document))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            [*COMMAND, "run", "tiny.yaml"],
            cwd=tmp_path,
            env=environment,
            stderr=log,
        ) as process,
    ):
        words = f"Serving HTTP on http://127.0.0.1:{port}"
        until(lambda: process.poll() is not None or words in (tmp_path / "log").read_text(), 100)
        answer = httpx.post(f"http://127.0.0.1:{port}/prompt", json={"prompt": "What is 2 + 3?"})
        assert answer.json()["model"] == "tiny"
        process.send_signal(number)
        assert process.wait(60) == 0
    until(lambda: not left_behind(tmp_path))
