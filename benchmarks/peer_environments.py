"""The virtual environment of each peer, with its pins; made once and used again.

An environment is used again when its stamp has the same pins. pip installs torch, because uv does
not read pip's configuration, in which a machine without a GPU can name a build for CPUs. uv
installs the rest, in a fraction of pip's time, and leaves torch as it is.
"""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

INSTALL_S = 900
"""Seconds one peer's installation may take."""


class PeerError(RuntimeError):
    """A peer cannot take part; the message is the sentence that says why."""


def python_of(home: Path, requirements: tuple[str, ...], removed: tuple[str, ...] = ()) -> Path:
    """Returns the interpreter of the environment in `home`, which is made if necessary.

    Raises `PeerError`.

    `removed` are packages that are installed as dependencies and get in the way.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once would spoil it
        return _made(home, requirements, removed)


def _made(home: Path, requirements: tuple[str, ...], removed: tuple[str, ...]) -> Path:
    python = home / "bin" / "python"
    pins = json.dumps([requirements, removed])
    stamp = home / "made-with.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == pins:
        return python
    shutil.rmtree(home, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    uv = [str(Path(sys.executable).with_name("uv")), "pip"]
    steps = [[sys.executable, "-m", "venv", "--without-pip", str(home)]]
    if torch := [each for each in requirements if each.startswith("torch==")]:
        steps.append([*pip, "install", "--quiet", "--no-compile", *torch])
    steps.append([*uv, "install", "--quiet", "--python", str(python), *requirements])
    if removed:
        steps.append([*uv, "uninstall", "--quiet", "--python", str(python), *removed])
    for step in steps:
        _run(step)
    stamp.write_text(pins, encoding="utf-8")
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"It could not be installed: {error}.") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerError(f"It could not be installed: {said[-1] if said else done.returncode}.")


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the version of each package in an environment. Raises `PeerError`."""
    script = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run([str(python), "-c", script, *packages], capture_output=True, text=True)
    if done.returncode:
        raise PeerError("Its environment lacks a package; delete it and run again.")
    found: dict[str, str] = json.loads(done.stdout)
    return found
