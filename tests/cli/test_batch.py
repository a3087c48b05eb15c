"""`mixtral-serve batch`: files, continuing, exit codes."""

import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion

from serve_app.api.batch import URLS
from serve_app.cli.batch_files import BatchInput, BatchOutput
from serve_app.cli.commands import main
from serve_app.config.serve_config import ConfigError
from serve_app.protocol import batch
from tests.cli.test_commands import COMMAND
from tests.environment import bare
from tests.worker.conftest import until

SUM = [{"role": "user", "content": "What is 2 + 3?"}]


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    """Returns a request that chats, with these fields beside its messages."""
    chat = {"messages": SUM, "temperature": 0, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": chat}


def written(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_a_batch_is_answered_and_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All lines have results; a second call with more lines answers these alone."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line(f"sum {i}") for i in range(5)]
    assert main(["batch", "tiny", str(written(source, lines)), str(out)]) == 0
    first = results(out)
    assert {each["custom_id"] for each in first} == {each["custom_id"] for each in lines}
    for each in first:
        chat = ChatCompletion.model_validate(each["response"]["body"])
        assert chat.choices[0].message.content == "2 + 3 = 5."
    assert "5 of 5 requests" in capsys.readouterr().out

    written(source, [*lines, line("more"), line("bad", tempature=1)])
    assert main(["batch", "tiny", str(source), str(out)]) == 1
    assert results(out)[:5] == first
    assert {each["custom_id"] for each in results(out)[5:]} == {"more", "bad"}
    output = capsys.readouterr().out
    assert output.startswith("Answering: 5 of 7 requests")
    assert output.splitlines()[-1] == f"{out}: 6 answered, 1 failed."


def test_a_finished_batch_loads_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call that has nothing left to do says so at once."""
    source, out = written(tmp_path / "in", [line("a")]), tmp_path / "out"
    response: batch.BatchResponse = {"status_code": 200, "request_id": "r", "body": {}}
    written(out, [dict(batch.response_result("a", response))])
    assert main(["batch", "no-such-config", str(source), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 1 answered, 0 failed.\n"


def test_ctrl_c_loses_no_result(tmp_path: Path) -> None:
    """A stopped batch exits with 130, all its results are whole, and a second call has the rest."""
    lines = [line(str(i), ignore_eos=True, max_tokens=300) for i in range(80)]
    written(tmp_path / "in", lines)
    out = tmp_path / "out"
    command = [*COMMAND, "batch", "tiny", "in", "out"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=bare(tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: process.poll() is not None or (out.exists() and out.stat().st_size))
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Stopped; run the same command again to continue."
    assert "Traceback" not in errors
    stopped = results(out)
    assert 0 < len(stopped) < 80
    done = subprocess.run(
        command, cwd=tmp_path, env=bare(tmp_path), capture_output=True, check=False
    )
    assert done.returncode == 0
    assert results(out)[: len(stopped)] == stopped
    assert sorted(each["custom_id"] for each in results(out)) == sorted(
        each["custom_id"] for each in lines
    )


@given(st.data())
def test_a_torn_last_line_is_dropped(data: st.DataObject) -> None:
    """Wherever the file was cut, it continues after its whole lines, and holds no half of one."""
    whole = b"".join(
        json.dumps({"custom_id": name, "response": {"status_code": status}, "error": None}).encode()
        + b"\n"
        for name, status in (("ä", 200), ("b", 400), ("c", 200))
    )
    kept = whole[: data.draw(st.integers(0, len(whole)))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "out")
        path.write_bytes(kept)
        output = BatchOutput(path)
        num_whole = kept.count(b"\n")
        assert len(output) == num_whole
        assert output.failed == ({"b"} if num_whole >= 2 else set())
        output.write(batch.response_result("d", {"status_code": 200, "request_id": "", "body": 1}))
        output.close()
        ids = [each["custom_id"] for each in results(path)]
    assert ids == [*["ä", "b", "c"][:num_whole], "d"]


def test_files_that_do_not_fit_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is loaded or written where a file is missing, is no result, or is another batch's."""
    source, other = written(tmp_path / "in", [line("a")]), tmp_path / "other"
    for text, words in [
        ('{"custom_id": "z", "response": {"status_code": 200}, "error": null}\n', "result for 'z'"),
        ('{"messages": []}\n', "line 1 is not a result"),
        ("3\n", "line 1 is not a result"),
    ]:
        other.write_text(text)
        assert main(["batch", "tiny", str(source), str(other)]) == 1
        assert words in capsys.readouterr().err
        assert other.read_text() == text
    assert main(["batch", "tiny", str(source), str(source)]) == 1
    assert "is the file of requests" in capsys.readouterr().err
    assert main(["batch", "tiny", str(tmp_path / "none"), str(other)]) == 1
    assert "is not a file" in capsys.readouterr().err
    assert main(["batch", "tiny", str(source), str(tmp_path / "no" / "out")]) == 1
    assert "cannot be written: No such file or directory." in capsys.readouterr().err


def test_one_batch_writes_at_a_time(tmp_path: Path) -> None:
    """A second batch with the same output is refused while the first one has it open."""
    first = BatchOutput(tmp_path / "out")
    with pytest.raises(ConfigError, match="another batch writes"):
        BatchOutput(tmp_path / "out")
    first.close()
    BatchOutput(tmp_path / "out").close()


def test_empty_lines_are_none(tmp_path: Path) -> None:
    """Empty lines count for the line's number and are no requests."""
    (tmp_path / "in").write_text(f"\n{json.dumps(line('a'))}\n \nnonsense")
    assert [key for key, _ in BatchInput(tmp_path / "in", URLS)] == ["a", 4]
