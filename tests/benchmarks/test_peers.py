"""The comparison of several servers: failures are named, and servers are ended."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks import long_prompts
from benchmarks.comparison import OURS, OURS_SERVE
from benchmarks.peer_environments import PeerError, python_of, versions
from benchmarks.peer_loads import LOADS
from benchmarks.peer_servers import PEERS, Peer, Site
from benchmarks.peers import Run, run_all
from serve_app.machine.ports import free_port
from tools.server_process import serving

SERVER = Path(__file__).with_name("completions.py")
FIRST = {"prompt": "x", "max_tokens": 1}


def peer(name: str, command: Callable[[Site], list[str]]) -> Peer:
    return Peer(name, ("numpy",), command, lambda site: name, "for a test")


def small(site: Site) -> list[str]:
    return [str(site.python), str(SERVER), str(site.port), str(site.folder / "child")]


def options(environments: Path) -> argparse.Namespace:
    return argparse.Namespace(
        environments=environments,
        loads=list(LOADS),
        concurrency=[1, 2],
        requests=4,
        conversations=3,
        sizes=[45, 90],
        repeats=1,
        notes="",
    )


def test_one_that_fails_is_named_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends at once is left out with a sentence; the others run all loads twice."""
    monkeypatch.setattr(long_prompts, "SETTLED_S", 0.1)
    run = Run(tmp_path, options(tmp_path))
    broken = peer("broken", lambda site: [str(site.python), "-c", "raise SystemExit(3)"])
    run_all(run, (broken, peer(OURS, small), peer("other", small)), rounds=2)
    document = run.document()
    assert list(document["left_out"]) == ["broken"]
    assert "ended with code 3" in document["left_out"]["broken"]
    assert document["rounds"] == {OURS: 2, "other": 2}
    middle = document["medians"][OURS]
    cases = {load: list(cases) for load, cases in middle.items()}
    assert cases == {
        "short": ["1 at once", "2 at once"],
        "conversations": ["3 conversations"],
        "long": [f"{size} tokens, {n} at once" for size in (45, 90) for n in (1, 4)],
        "beside": ["a stream beside 90 tokens"],
    }
    assert all(level["errors"] == 0 for cases in middle.values() for level in cases.values())
    assert document["peers"]["other"]["same_answer"] == 1.0
    compared = document["ours_to_theirs"][OURS]["other"]
    assert {name.partition(":")[0] for name in compared} == {n for c in cases.values() for n in c}
    assert document["table"][0].split("|")[2:4] == [f" {OURS} ", " other "]


def test_no_round_begins_that_would_end_too_late(tmp_path: Path) -> None:
    """The first round runs whatever its time; without time for another one it is the last."""
    asked = options(tmp_path)
    asked.loads, asked.concurrency = ["short"], [1]
    run = Run(tmp_path, asked)
    run_all(run, (peer(OURS, small),), rounds=3, limit_s=0.001)
    assert run.document()["rounds"] == {OURS: 1}


def test_a_server_ends_with_its_children(tmp_path: Path) -> None:
    """A child in a session of its own is gone at the end of the block."""
    port = free_port()
    command = [sys.executable, str(SERVER), str(port), str(tmp_path / "child")]
    with serving(command, {}, f"http://127.0.0.1:{port}", FIRST, tmp_path / "log"):
        child = int((tmp_path / "child").read_text())
        assert is_alive(child)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    """Returns False for a zombie too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wheel(folder: Path) -> Path:
    """Writes a package without modules, "small" 1.0, that pip installs without an index."""
    path, about = folder / "small-1.0-py3-none-any.whl", "small-1.0.dist-info"
    with ZipFile(path, "w") as file:
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return path


def test_an_environment_is_made_once(tmp_path: Path) -> None:
    """The same pins use it again, other pins make it anew; pip's last line becomes the error."""
    home = tmp_path / "home"
    pins = (f"small @ file://{wheel(tmp_path)}",)
    absent = (f"nothing @ file://{tmp_path}/nothing-1.0-py3-none-any.whl",)
    assert versions(python_of(home, pins), ("small",)) == {"small": "1.0"}
    (home / "kept").touch()
    assert python_of(home, pins).exists()
    assert (home / "kept").exists()
    for _ in range(2):
        with pytest.raises(PeerError, match=r"could not be installed: .*nothing"):
            python_of(home, absent)
    assert not (home / "kept").exists()


def test_all_peers_have_a_command_and_pins(tmp_path: Path) -> None:
    """Every peer has a command with its port, and requirements unless it is ours."""
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    site = Site(tmp_path / "bin" / "python", tmp_path, tmp_path, tmp_path, 12345, 2)
    own = [OURS, OURS_SERVE]
    assert [peer.name for peer in PEERS] == [*own, "vllm", "transformers", "llama.cpp"]
    for each in PEERS:
        written = "".join(each.command(site)) + (tmp_path / "ours.yaml").read_text()
        assert "12345" in written
        assert each.variables(site) is not None
        assert bool(each.requirements) == (each.name not in own)
