"""The entry point: importing it loads nothing, and every failure is one sentence in the log."""

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from serve_app.api.ingress import create_app
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.worker.process import ENTRY, TINY, environment, run_entry

WORKER = ENTRY.parent / "serve_app" / "worker"
HEAVY = {"torch", "transformers", "bitsandbytes", "accelerate", "ray", "runpod", "starlette"}


def test_sigterm_before_any_job_is_a_clean_end(tmp_path: Path) -> None:
    """SIGTERM while the hub does not answer ends the worker with code 0 and a log line."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        variables = environment(
            tmp_path,
            RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:9/job-take/$ID?gpu=x",
            MODEL_NAME="owner/model",
            HF_ENDPOINT=f"http://127.0.0.1:{hub.getsockname()[1]}",
        )
        with subprocess.Popen(
            [sys.executable, str(ENTRY)], cwd=tmp_path, env=variables, stderr=subprocess.PIPE
        ) as entry:
            connection, _ = hub.accept()
            with connection:
                entry.send_signal(signal.SIGTERM)
                _, written = entry.communicate(timeout=60)
    assert entry.returncode == 0
    assert b"Stopped before any job" in written
    assert b"Traceback" not in written


def test_sigterm_during_a_test_input_is_no_success(tmp_path: Path) -> None:
    """SIGTERM while `--test_input` imports its libraries is no end with code 0 and no output."""
    with subprocess.Popen(
        [sys.executable, str(ENTRY), "--test_input", '{"input": {"prompt": "x"}}'],
        cwd=tmp_path,
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
    ) as entry:
        assert entry.stderr is not None
        assert b"Starting with" in entry.stderr.readline()
        entry.send_signal(signal.SIGTERM)
        assert entry.wait(60) == -signal.SIGTERM


def test_importing_loads_nothing_heavy() -> None:
    """Importing the worker loads no heavy library, so failures come after logging starts."""
    modules = ["runpod_entry", *(f"serve_app.worker.{path.stem}" for path in WORKER.glob("*.py"))]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ENTRY.parent, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert loaded.issuperset(modules)
    assert not HEAVY & loaded


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"SERVE_CONFIG": "missing.yaml", "RUNPOD_SERVERLESS": "false"},
            "missing.yaml: cannot be read",
        ),
        ({}, "There are no jobs to take"),
        (
            {"MIXTRAL_ENGINE__MAX_LEN": "5", "RUNPOD_SERVERLESS": "false", "PORT": "0"},
            "MIXTRAL_ENGINE__MAX_LEN, which is not a setting",
        ),
        (
            {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/", "RUNPOD_LOG_LEVEL": "WARNING"},
            "RUNPOD_LOG_LEVEL must be",
        ),
        ({"PORT": "eighty"}, "The environment: PORT:"),
    ],
)
def test_a_wrong_environment_is_one_sentence(
    tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    """A wrong environment is exit code 1 and a line on what to change, without a traceback."""
    done = run_entry(tmp_path, **variables)
    assert done.returncode == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_with_the_setting_each_line_is_json(tmp_path: Path) -> None:
    """`log_format: json` holds from the first line on, and for the error that ends a start."""
    done = run_entry(tmp_path, MIXTRAL_OBSERVABILITY__LOG_FORMAT="json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert lines[-1]["level"] == "ERROR"
    assert "RUNPOD_WEBHOOK_GET_JOB" in lines[-1]["message"]


def test_the_first_line_comes_before_the_slow_imports(tmp_path: Path) -> None:
    """A busy machine needs seconds for the imports, during which the log is not empty."""
    (tmp_path / "config.yaml").write_text("unknown: key")
    variables = environment(tmp_path, SERVE_CONFIG="config.yaml", PYTHONPROFILEIMPORTTIME="1")
    done = subprocess.run(
        [sys.executable, str(ENTRY), "--test_input", '{"input": {"prompt": "x"}}'],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    before, line, after = done.stderr.partition("Starting with config.yaml.")
    assert line
    imported = [
        {line.rpartition("|")[2].strip() for line in part.splitlines()} for part in (before, after)
    ]
    slow = {"numpy", "ray.serve"}
    assert not slow & imported[0]
    assert slow <= imported[1]


def test_the_sdks_local_api_is_refused_by_name(tmp_path: Path) -> None:
    """`--rp_serve_api` is exit code 1 and a line that names it and what does the same."""
    done = run_entry(tmp_path, "--rp_serve_api", "--rp_api_port", "8001")
    assert done.returncode == 1
    assert "--rp_serve_api is not supported; `python -m emulator`" in done.stderr


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "is not valid JSON"), ("[1]", "must be an object")]
)
def test_a_test_input_that_is_no_job_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    """A test input that is no JSON object is refused, on the command line and in the file."""
    done = run_entry(tmp_path, "--test_input", text)
    assert (done.returncode, sentence in done.stderr) == (1, True)
    (tmp_path / "test_input.json").write_text(text)
    done = run_entry(tmp_path)
    assert (done.returncode, sentence in done.stderr) == (1, True)
    assert "test_input.json" in done.stderr


def test_the_test_input_file_is_really_run(tmp_path: Path) -> None:
    """`./test_input.json` is run: a bad job prints its error and is exit code 1."""
    (tmp_path / "test_input.json").write_text('{"input": {"nothing": 1}}')
    done = run_entry(tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["status"] == "VALIDATION_FAILED"


QUESTION = {"prompt": "What is the capital of France?", "temperature": 0}
IN_4_BITS = str(TINY.with_name("tiny-nf4.yaml"))


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of `--test_input` for `QUESTION`, with the tiny model in NF4 and no home
    folder."""
    job = {"input": {"endpoint": "/prompt", "data": QUESTION}}
    variables = {"SERVE_CONFIG": IN_4_BITS, "HOME": "/proc"}
    home = tmp_path_factory.mktemp("test-input")
    done = run_entry(home, "--test_input", json.dumps(job), **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ray
def test_a_test_input_prints_its_answer(printed: str) -> None:
    """`--test_input` prints the answer as JSON and nothing else; no home folder is needed."""
    answer = json.loads(printed)
    assert answer.keys() == {"text", "finish_reason", "usage", "model"}
    assert answer["text"] == "The capital of France is Paris."


@pytest.mark.ray
def test_jobs_and_http_serve_four_bits(printed: str) -> None:
    """The tiny model in NF4 gives a job the same answer as an HTTP request."""
    server = MixtralServer(Settings.from_yaml(IN_4_BITS))
    try:
        response = TestClient(create_app(lambda: server)).post("/prompt", json=QUESTION)
    finally:
        server.close()
    assert json.loads(printed) == response.json()
