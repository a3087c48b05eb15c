"""The file of API keys, as the command writes it and the server reads it."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve_app.cli.commands import main
from serve_app.config.key_file import KeyLimits, add_key, read_keys, remove_key, sha256
from serve_app.config.serve_config import ConfigError

NO_LIMITS = KeyLimits()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_shown_once_and_never_stored(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the key; the file, for its owner alone, and the list have its hash and
    name."""
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--min-priority", "5"]
    assert main(["keys", "add", "ann", "--file", str(path), *limits]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-mixtral-")
    assert len(key) > 50
    assert key.removeprefix("sk-mixtral-") not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (found,) = read_keys(path)
    assert (found.name, found.sha256) == ("ann", sha256(key))
    assert (found.requests_per_minute, found.tokens_per_minute) == (60, 9000)
    assert (found.max_concurrent, found.min_priority) == (None, 5)
    assert main(["keys", "list", "--file", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("ann", "60", "9,000", "5"))
    assert main(["keys", "remove", "ann", "-f", str(path)]) == 0
    assert read_keys(path) == ()


def test_keys_that_are_added_at_once_are_all_kept(path: Path) -> None:
    """Keys that are added at the same time are all in the file."""
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda n: add_key(path, f"key{n}", NO_LIMITS), range(24)))
    assert {each.sha256 for each in read_keys(path)} == set(map(sha256, keys))


@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 65, "a\n", "API_KEYS-1"])
def test_a_name_is_fit_for_logs_and_metrics(path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a key"):
        add_key(path, name, NO_LIMITS)
    assert not path.exists()


def test_the_servers_user_can_still_read_the_file(path: Path) -> None:
    """A change keeps the mode, the owner and the group of the file, and a link to it."""
    link = path.with_name("link.json")
    link.symlink_to(path.name)
    add_key(link, "ann", NO_LIMITS)
    path.chmod(0o640)
    if is_root := os.geteuid() == 0:
        os.chown(path, 1234, 5678)
    add_key(link, "bob", NO_LIMITS)
    remove_key(link, "ann")
    found = path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert not is_root or (found.st_uid, found.st_gid) == (1234, 5678)
    assert link.is_symlink()
    assert [each.name for each in read_keys(link)] == ["bob"]
    assert {each.name for each in path.parent.iterdir()} == {path.name, link.name}


def test_a_list_in_a_pipe_has_whole_names(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest name, which `remove` needs, stands in one line, also with a narrow terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    name = 54 * "n" + "@example.c"
    add_key(path, name, NO_LIMITS)
    assert main(["keys", "list", "-f", str(path)]) == 0
    assert name in capsys.readouterr().out


def test_what_is_wrong_is_one_sentence(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that exists, an unknown name, a missing file and an invalid file each give one
    sentence."""
    add_key(path, "ann", NO_LIMITS)
    with pytest.raises(ConfigError, match="a key 'ann' exists already"):
        add_key(path, "ann", NO_LIMITS)
    with pytest.raises(ConfigError, match="there is no key 'bob'"):
        remove_key(path, "bob")
    assert main(["keys", "list", "-f", str(path.with_name("absent"))]) == 1
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    (ann,) = json.loads(path.read_text())["keys"]
    wrong: list[list[dict[str, str]]] = [
        [{"name": "ann"}],
        [ann, ann | {"sha256": 64 * "0"}],
        [ann, ann | {"name": "bob"}],
        [ann | {"name": "API_KEYS-1"}],
    ]
    for contents in ("{", "[]", '{"keys": [], "x": 1}', *(json.dumps({"keys": w}) for w in wrong)):
        path.write_text(contents)
        with pytest.raises(ConfigError, match="is not a file of API keys"):
            read_keys(path)


def test_check_reads_the_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing or broken file is an error before anything starts."""
    config = path.with_name("config.yaml")
    tiny = Path("configs/tiny.yaml").read_text()
    config.write_text(f"{tiny}      api:\n        keys_file: {path}\n")
    assert main(["check", str(config)]) == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err
