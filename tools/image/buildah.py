"""Builds the project's Dockerfile with buildah, which needs root and no daemon.

Images stay in STORAGE, so that a second run builds only what has changed.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORAGE = Path(os.environ.get("IMAGES", "/tmp/mixtral-serve-images"))
BASE = "localhost/python-stand-in"
PROGRAMS = ("buildah", "crun", "debootstrap")
CAPABILITY = "9.0"
"""The compute capability of the kernels in the tests' images; a release has all."""
CUDA_PACKAGES = ("cuda-bindings", "cuda-pathfinder", "nvidia-cuda-nvrtc")
"""The packages that compile the kernels. torch's builds for CUDA bring them, those for a CPU do
not."""


class ImageError(RuntimeError):
    """A program that builds an image has failed; the message is what it wrote last."""


def missing() -> str | None:
    """Returns the reason why no image can be built here, or None."""
    if os.getuid() != 0:
        return "only root can build an image and run it"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def buildah(*arguments: str) -> str:
    """Runs buildah and returns its output. Raises `ImageError` if it fails."""
    command = ["buildah", "--root", f"{STORAGE}/layers", "--runroot", f"{STORAGE}/run", *arguments]
    return _run(command)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImageError(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout.strip()


@dataclass(frozen=True)
class Build:
    """A successful build: the image's name, and the seconds that it took."""

    image: str
    seconds: float


def build(image: str, *options: str, context: Path = ROOT) -> Build:
    """Builds the Dockerfile in `context` on `BASE`, with this machine's package index."""
    began = time.monotonic()
    buildah(
        *("build", "--isolation", "chroot", "--layers", "--from", BASE, "--tag", image),
        *("--build-arg", f"CUDA_CAPABILITIES={CAPABILITY}", *package_index(), *options),
        str(context),
    )
    return Build(image, time.monotonic() - began)


def package_index() -> list[str]:
    """Returns the options that mount this machine's configuration of pip, and the local folders
    that it names."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # `:env:.find-links='/folder'`, `global.index-url='https://...'`
    found = dict(re.findall(r"^[^.]+\.([\w-]+)=(.*)$", listed, re.MULTILINE))
    values = {name: str(ast.literal_eval(value)) for name, value in found.items()}
    configuration = STORAGE / "pip.conf"
    configuration.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name} = {' '.join(value.split())}" for name, value in values.items()]
    configuration.write_text("\n".join(["[global]", *lines, ""]))
    words = [word.removeprefix("file://") for each in values.values() for word in each.split()]
    paths = {Path(word).resolve() for word in words if word.startswith("/")}
    # An index is a folder of links to files beside it.
    paths = {path.parent if path.name == "simple" else path for path in paths if path.exists()}
    mounts = [f"{configuration}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in sorted(paths))]
    return [word for mount in mounts for word in ("--volume", mount)]


def make_base() -> None:
    """Makes the image BASE, Debian with its Python, which replaces the Dockerfile's base image.

    So tests need no registry. /usr/local has a virtual environment, because Python is there in the
    Dockerfile's base image.
    """
    if f"{BASE}:latest" in buildah("images", "--format", "{{.Name}}:{{.Tag}}"):
        return
    (release,) = re.findall(r"FROM python:\S+-slim-(\w+) ", (ROOT / "Dockerfile").read_text())
    tree = STORAGE / "debian"
    shutil.rmtree(tree, ignore_errors=True)
    packages = "--include=ca-certificates,python3-venv"
    command = ["debootstrap", "--variant=minbase", packages, release, str(tree)]
    _run(command)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(tree), "/")
    shutil.rmtree(tree)
    install = f"pip install --no-deps -c /tmp/pins {' '.join(CUDA_PACKAGES)}"
    script = f"python3 -m venv /usr/local && {install}"
    pins = f"{ROOT}/requirements-dev.txt:/tmp/pins:ro"
    options = [*package_index(), "--volume", pins]
    path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    buildah("config", "--env", path, container)
    buildah("run", "--isolation", "chroot", *options, container, "--", "sh", "-ec", script)
    buildah("commit", "--quiet", "--rm", container, BASE)


def configuration(image: str) -> dict[str, Any]:
    """Returns the image's configuration in OCI's form, with `config` and `history`."""
    found = json.loads(buildah("inspect", "--type", "image", image))
    document: dict[str, Any] = found["OCIv1"]
    return document
