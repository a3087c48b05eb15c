"""The command `mixtral-serve`: what it prints, its exit codes, and what it imports."""

import errno
import io
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve_app.cli import serving
from serve_app.cli.commands import main, message_of
from serve_app.config import named
from serve_app.config.log_format import use_json
from serve_app.config.settings import ConfigError, Settings
from serve_app.machine.ports import free_port
from serve_app.node import banner
from serve_app.tiny import CHECKPOINT
from tests.environment import bare
from tests.processes import all_below
from tests.settled import left_behind
from tests.worker.conftest import until

CODE = "import sys; from serve_app.cli.commands import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", CODE]


def on_port(port: int, **args: Any) -> str:
    """Returns the YAML of configs/tiny.yaml on `port`, with these sections of `args:`."""
    document = yaml.safe_load(named.find("tiny").read_text())
    document["http_options"]["port"] = port
    document["applications"][0]["args"] |= args
    return yaml.safe_dump(document)


def test_check_takes_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration of the package needs no path."""
    (tmp_path / "tiny.yaml").write_text(on_port(0))  # port 8000 may be in use on this machine
    monkeypatch.setattr(named, "FOLDER", tmp_path)
    assert main(["check", "tiny"]) == 0
    assert "context 16,384 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_port_in_use_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """It names the setting; `run` says it before Ray starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path, port = tmp_path / "tiny.yaml", taken.getsockname()[1]
        path.write_text(on_port(port))
        assert main([command, str(path)]) == 1
    assert capsys.readouterr().err == (
        f"{path}: `http_options.port`: port {port} of 127.0.0.1 is in use; end the process that "
        "listens there, or choose another port.\n"
    )


@pytest.mark.parametrize(
    ("host", "keys", "level", "words"),
    [
        ("127.0.0.1", None, logging.INFO, "from this machine only"),
        ("127.0.0.1", "a", logging.INFO, "one of the API keys"),
        ("0.0.0.0", "a", logging.INFO, "every machine that reaches 0.0.0.0:8000, with one of"),
        ("0.0.0.0", None, logging.WARNING, "WITHOUT an API key. Set API_KEYS"),
    ],
)
def test_the_log_says_who_can_send_requests(
    host: str, keys: str | None, level: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is open to other machines without a key is a warning that says what to set."""
    if keys is not None:
        monkeypatch.setenv("API_KEYS", keys)
    settings = Settings.from_args({"model": {"name": "tiny"}}, "test")
    said = banner.exposure({"host": host, "port": 8000}, settings)
    assert said[0] == level
    assert words in said[1]


def test_a_name_that_is_none_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence lists the names; the exit code is 1."""
    assert main(["run", "tinny"]) == 1
    assert capsys.readouterr().err == (
        "There is no configuration 'tinny'; use local, runpod, tiny, tiny-nf4, or a YAML file's "
        "path.\n"
    )


def errors_of(command: list[str], folder: Path) -> list[str]:
    """Returns the lines that a command, which must end with exit code 1, writes to stderr."""
    done = subprocess.run(
        command, cwd=folder, env=bare(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stderr.splitlines()


def test_a_wrong_setting_is_one_sentence(tmp_path: Path) -> None:
    """Ray starts while `run` checks; a configuration that is refused ends it again."""
    (tmp_path / "wrong.yaml").write_text(on_port(free_port(), engine={"max_runing": 3}))
    errors = errors_of([*COMMAND, "run", "wrong.yaml"], tmp_path)
    first, sentence = errors
    assert "starts with wrong.yaml" in first
    assert sentence == "wrong.yaml: `engine.max_runing` is not a setting."
    until(lambda: not left_behind(tmp_path))


@pytest.mark.parametrize("error", [ConfigError("Use another port."), KeyError("a bug")])
def test_an_error_is_json_where_the_log_is_json(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence that ends a server, and the traceback of a bug, are one line of its log."""

    def fail(_: str) -> int:
        raise error

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    use_json([handler])
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(serving, "run", fail)
    assert main(["run", "tiny"]) == 1
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["level"], line["message"]) == ("ERROR", str(error))
    assert ("exception" in line) == isinstance(error, KeyError)


@pytest.mark.parametrize("name", ["absent/report.json", "."])
@pytest.mark.parametrize(
    "command", [["quality", "tiny", "--json"], ["check", "tiny", "--load", "--out"]]
)
def test_a_report_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], name: str
) -> None:
    """A folder that does not exist, and a folder in place of a file: before the model loads."""
    assert main([*command, str(tmp_path / name)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / name}: ")
    assert line.endswith(
        f"{command[-1]} names another file{' for the report' * (command[0] == 'check')}."
    )


def test_an_error_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    """It names the file and the reason; a bug has none, and keeps its stack trace."""
    with pytest.raises(OSError, match="absent") as raised:
        (tmp_path / "absent").read_text()
    assert message_of(raised.value) == f"{tmp_path}/absent: No such file or directory."
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert message_of(full) == "The output cannot be written: No space left on device."
    assert message_of(OSError("closed")) is None
    assert message_of(KeyError("a")) is None


def test_few_open_files_are_one_sentence(tmp_path: Path) -> None:
    """`run` says it before Ray starts, whose own error is a stack trace."""
    (tmp_path / "tiny.yaml").write_text(on_port(free_port()))
    errors = errors_of(
        ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *COMMAND, "run", "tiny.yaml"], tmp_path
    )
    (line,) = errors
    assert line.startswith("A process may open 64 files, but Ray needs 256; raise the limit")


def test_a_narrow_terminal_without_unicode(tmp_path: Path) -> None:
    """A table of keys is whole in 40 columns of ASCII."""
    variables = {"PYTHONIOENCODING": "ascii", "COLUMNS": "40", "FORCE_COLOR": "1"}
    for arguments in (["add", "ada"], ["list"]):
        done = subprocess.run(
            [*COMMAND, "keys", *arguments],
            cwd=tmp_path,
            env=bare(tmp_path) | variables,
            capture_output=True,
            check=True,
        )
    table = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode("ascii"))
    assert "ada" in table
    assert "?" not in table, "characters are missing"
    assert max(map(len, table.splitlines())) == 40


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
    assert lines[-1] == f"{tmp_path}/out is complete."
    assert (tmp_path / "out" / "config.json").exists()


@contextmanager
def served(folder: Path, **variables: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Yields a serving `mixtral-serve run` of the tiny model, and its URL; nothing of it stays."""
    port = free_port()
    (folder / "tiny.yaml").write_text(on_port(port))
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [*COMMAND, "run", "tiny.yaml"], cwd=folder, env=bare(folder) | variables, stderr=log
        ) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        words = f"Serving HTTP on {url}"
        try:
            until(lambda: process.poll() is not None or words in (folder / "log").read_text(), 100)
            yield process, url
        finally:
            process.kill()
    until(lambda: not left_behind(folder))


@pytest.mark.ray
def test_run_serves_where_the_yaml_says(tmp_path: Path) -> None:
    """The log ends with the URL and a command that works. SIGTERM to all processes, as systemd
    sends it to Ray's too, lets a stream finish; the exit code is 0 as for one process."""
    body = {"prompt": "x", "ignore_eos": True, "max_tokens": 2000, "stream": True}
    with served(tmp_path) as (process, url):
        *before, last = (tmp_path / "log").read_text().splitlines()
        assert len(before) < 15
        example = last.partition("; try: ")[2]
        assert url in example
        done = subprocess.run(shlex.split(example), capture_output=True, check=True)
        assert json.loads(done.stdout)["text"] == "The capital of France is Paris."
        with httpx.stream("POST", f"{url}/prompt", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            for each in (*all_below(process.pid), process):
                each.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert process.wait(60) == 0
