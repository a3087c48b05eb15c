"""`docker run IMAGE python runpod_entry.py --test_input ...` in containers of every kind."""

import json
import shutil
from pathlib import Path

import pytest

from serve_app.tiny import CHECKPOINT
from tools.image.container import Options, run

TINY = {"SERVE_CONFIG": "configs/tiny.yaml"}
PROMPT = json.dumps({"input": {"prompt": "What is 2 + 3?", "max_tokens": 8, "temperature": 0}})
ANSWER = ["python", "runpod_entry.py", "--test_input", PROMPT]
NAMELESS = 4242


def text_of(output: str) -> str:
    """Returns the text of the answer that the entry printed."""
    answer = json.loads(output)
    assert answer["usage"]["completion_tokens"] > 0
    return str(answer["text"])


@pytest.fixture(scope="module")
def expected(image: str) -> str:
    """The answer that a container as Docker makes it by default gives, with 64 MB of /dev/shm."""
    code, output, log = run(image, Options(ANSWER, environment=TINY))
    assert code == 0, log
    return text_of(output)


@pytest.mark.parametrize("user", [1000, NAMELESS])
def test_other_users_have_answers(image: str, expected: str, user: int) -> None:
    """`--user`: the image's own user and one without a name or a home, as OpenShift chooses it."""
    code, output, log = run(image, Options(ANSWER, user=user, environment=TINY))
    assert code == 0, log
    assert text_of(output) == expected


def test_a_read_only_root_needs_tmp_alone(image: str, expected: str) -> None:
    """`--read-only --tmpfs /tmp`: nothing else has to be written."""
    options = Options(ANSWER, environment=TINY, read_only=True, tmpfs=("/tmp",))
    code, output, log = run(image, options)
    assert code == 0, log
    assert text_of(output) == expected


def test_a_read_only_root_without_tmp_is_an_error(image: str) -> None:
    """`--read-only` alone: one sentence says what cannot be written; no traceback."""
    code, _, log = run(image, Options(ANSWER, environment=TINY, read_only=True))
    assert code == 1
    assert "Traceback" not in log
    assert "docker run --tmpfs /tmp" in log.splitlines()[-1]


def test_a_small_limit_of_processes_is_enough(image: str, expected: str) -> None:
    """`--pids-limit 300` counts threads too. Ray, its workers and the model stay below."""
    code, output, log = run(image, Options(ANSWER, environment=TINY, pids=300))
    assert code == 0, log
    assert text_of(output) == expected


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume of root's that every user may read."""
    folder = tmp_path / "volume"
    folder.mkdir(mode=0o755)
    return folder


def test_a_volume_that_root_alone_may_read_is_an_error(image: str, volume: Path) -> None:
    """The server does not run as root: one sentence names the path and the user."""
    shutil.copytree(CHECKPOINT, volume / "model")
    volume.chmod(0o700)
    variables = TINY | {"MODEL_NAME": "/runpod-volume/model"}
    options = Options(ANSWER, environment=variables, volumes={volume: "/runpod-volume"})
    code, _, log = run(image, options)
    assert code == 1
    assert "Traceback" not in log
    assert "/runpod-volume/model: user 1000 may not read" in log.splitlines()[-1]


@pytest.mark.parametrize("place", ["/runpod-volume", "/workspace"])
def test_weights_are_on_a_volume(image: str, expected: str, volume: Path, place: str) -> None:
    """A volume of root's, as RunPod mounts it: the model is read there, and a copy is kept."""
    shutil.copytree(CHECKPOINT, volume / "model")
    model = {"MODEL_NAME": f"{place}/model", "MIXTRAL_MODEL__CACHE_DIR": f"{place}/copy"}
    code, output, log = run(
        image, Options(ANSWER, environment=TINY | model, volumes={volume: place})
    )
    assert code == 0, log
    assert text_of(output) == expected
    assert (volume / "model").stat().st_uid == 0
    assert (volume / "copy").stat().st_uid == 1000


def test_a_cached_model_needs_no_network(image: str, expected: str, volume: Path) -> None:
    """RunPod's cached model, as its hosts mount it: found by its name, in a volume of root's."""
    name, commit = "owner/tiny", "0123456789abcdef0123456789abcdef01234567"
    folder = volume / "huggingface-cache" / "hub" / "models--owner--tiny"
    shutil.copytree(CHECKPOINT, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    options = Options(
        ANSWER, environment=TINY | {"MODEL_NAME": name}, volumes={volume: "/runpod-volume"}
    )
    code, output, log = run(image, options)
    assert code == 0, log
    assert text_of(output) == expected


def test_without_a_volume_nothing_is_left_there(image: str) -> None:
    """No folder of the image looks like a volume, before a run and after it."""
    command = [
        "sh",
        "-c",
        f"{' '.join(ANSWER[:2])} --test_input '{PROMPT}' >&2; ls -d /runpod-volume /workspace",
    ]
    code, output, log = run(image, Options(command, environment=TINY))
    assert code != 0
    assert output == ""
    assert "No such file" in log.splitlines()[-1]
