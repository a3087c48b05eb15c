"""The table of clients: each feature has a result, also where a client fails."""

import argparse
import sys
from pathlib import Path

import pytest

from benchmarks.clients.features import Server
from benchmarks.compat import run_program, table, try_client
from benchmarks.compat_clients import CLIENTS, PROGRAMS, Client

SERVER = Server("http://server", "tiny", "key", "/tokenizer")
PROGRAM = [sys.executable, "-m", "tests.benchmarks.program"]


def test_every_feature_has_a_result(tmp_path: Path) -> None:
    """A failed assertion is quoted, and a program that ends early leaves a reason for the rest."""
    found = dict(run_program(PROGRAM, 60, SERVER, [], tmp_path))
    assert list(found) == ["plain text", "wrong answer", "crash", "never tried"]
    assert found["plain text"] is None
    assert 'assert answer == "other"' in str(found["wrong answer"])
    assert "ended with code 7" in str(found["crash"])
    assert found["crash"] == found["never tried"]


def test_a_program_that_hangs_is_ended(tmp_path: Path) -> None:
    """A program that takes longer than its limit is killed, and the result says so."""
    hanging = [sys.executable, "-c", "import time; time.sleep(1000)"]
    ((name, error),) = run_program(hanging, 0.1, SERVER, ["chat"], tmp_path)
    assert name == "chat"
    assert "longer than 0.1 s" in str(error)


def test_a_client_that_cannot_be_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without npm, its client has one result, which says what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    client = Client("absent", ("absent@1.0.0",), "absent.mjs")
    options = argparse.Namespace(environments=tmp_path, features=[])
    (result,) = try_client(client, SERVER, options, tmp_path / "run")
    assert not result["passed"]
    assert "apt install nodejs npm" in result["error"]


def test_the_table_counts_what_works() -> None:
    """A client's line has its version, the features that work, and those that do not."""
    base: dict[str, object] = {"client": "one", "version": "1.0"}
    results: list[dict[str, object]] = [
        base | {"feature": "chat", "passed": True, "error": None},
        base | {"feature": "tools", "passed": False, "error": "no"},
    ]
    assert table(results)[2:] == ["| one | 1.0 | 1 of 2: chat | tools |"]


def test_every_client_has_a_program_and_exact_pins() -> None:
    """Each client has a program in the folder, and its first requirement is pinned."""
    for client in CLIENTS:
        assert (PROGRAMS / client.program).is_file(), client.name
        separator = "@" if client.is_npm else "=="
        assert separator in client.requirements[0]
