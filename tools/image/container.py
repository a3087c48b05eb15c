"""Runs an image as a container engine does: by the OCI runtime crun, from the image's settings.

A container has processes, mounts, host name and network of its own; its network is loopback alone.
It starts with the capabilities and the 64 MB of /dev/shm that Docker gives by default, and without
Docker's filter of system calls.
"""

import json
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.image.buildah import STORAGE, buildah, configuration

CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID"),
        *("SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
    )
]
"""The capabilities that Docker gives to root in a container."""
WITHOUT_UNIFIED = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
"""Hides cgroup v2 if version 1 has the controllers, because crun refuses both at once."""
LIMIT_S = 200


@dataclass(frozen=True)
class Options:
    """The options of `docker run`."""

    command: list[str] | None = None
    """Replaces the image's command."""
    entrypoint: list[str] | None = None
    """Replaces the image's entry point, as a pod's `command` does."""
    user: int = 0
    """The user id. A user without a name has root's group, as in Docker and OpenShift."""
    environment: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[Path, str] = field(default_factory=dict)
    """Folders of this machine, with the paths at which they are mounted."""
    tmpfs: tuple[str, ...] = ()
    read_only: bool = False
    shm_bytes: int = 64 << 20
    pids: int | None = None
    """Maximum number of processes and threads."""


@dataclass(frozen=True)
class Container:
    name: str
    process: "subprocess.Popen[bytes]"
    root: Path
    """The path of its root folder on this machine."""
    folder: Path

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Runs a command in the container, as its user, as `docker exec` does."""
        whole = _crun("exec", "--cwd", "/app", self.name, *command)
        return subprocess.run(whole, capture_output=True, text=True, timeout=LIMIT_S)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the container's first process, as `docker stop` does."""
        subprocess.run(_crun("kill", self.name, number.name), check=True)

    def wait(self) -> int:
        """Waits for its end; the exit code."""
        return self.process.wait(LIMIT_S)

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def log(self) -> str:
        """Its standard error."""
        return (self.folder / "log").read_text()

    def processes(self) -> list[str]:
        """Returns the command line of each of its processes, the first one first."""
        shown = self.run(
            "sh", "-c", "for it in /proc/[0-9]*; do tr '\\0' ' ' <$it/cmdline; echo; done"
        )
        return [line for line in shown.stdout.splitlines() if line]


@contextmanager
def container(image: str, options: Options) -> Iterator[Container]:
    """Runs the image until it ends, at the latest with the block."""
    name = f"mixtral-{uuid.uuid4().hex[:12]}"
    writable = buildah("from", "--name", name, image)
    folder = Path(tempfile.mkdtemp(dir=STORAGE))
    try:
        root = Path(buildah("mount", writable))
        (folder / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 container\n")
        specification = _specification(image, options, root, folder)
        (folder / "config.json").write_text(json.dumps(specification))
        with (
            (folder / "output").open("wb") as output,
            (folder / "log").open("wb") as log,
            subprocess.Popen(
                _crun("run", "--bundle", str(folder), name), stdout=output, stderr=log
            ) as process,
        ):
            try:
                yield Container(name, process, root, folder)
            finally:
                subprocess.run(_crun("delete", "--force", name), capture_output=True)
                process.wait(LIMIT_S)
    finally:
        buildah("rm", writable)
        shutil.rmtree(folder)


def run(image: str, options: Options) -> tuple[int, str, str]:
    """Runs the image to its end; exit code, standard output, standard error."""
    with container(image, options) as it:
        code = it.wait()
        return code, it.output, it.log


def _crun(*arguments: str) -> list[str]:
    hidden = ["unshare", "--mount", "sh", "-c", WITHOUT_UNIFIED, "sh"]
    return [*hidden, "crun", "--root", f"{STORAGE}/containers", *arguments]


def _specification(image: str, options: Options, root: Path, folder: Path) -> dict[str, Any]:
    """Returns OCI's runtime specification for the image's settings and `options`."""
    config = configuration(image)["config"]
    entrypoint = config["Entrypoint"] if options.entrypoint is None else options.entrypoint
    command = config["Cmd"] if options.command is None else options.command
    environment = dict(each.split("=", 1) for each in config["Env"]) | dict(options.environment)
    home = "/root" if options.user == 0 else "/home/serve" if options.user == 1000 else "/"
    granted = CAPABILITIES if options.user == 0 else []
    limits: dict[str, Any] = {} if options.pids is None else {"pids": {"limit": options.pids}}
    return {
        "ociVersion": "1.0.0",
        "root": {"path": str(root), "readonly": options.read_only},
        "hostname": "container",
        "process": {
            "args": [*entrypoint, *command],
            "env": [f"{name}={value}" for name, value in ({"HOME": home} | environment).items()],
            "cwd": config["WorkingDir"],
            "user": {"uid": options.user, "gid": 1000 if options.user == 1000 else 0},
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": granted,
                "permitted": granted,
            },
        },
        "mounts": [*_mounts(options), _bind(folder / "hosts", "/etc/hosts")],
        "linux": {
            "namespaces": [
                {"type": each} for each in ("pid", "network", "ipc", "uts", "mount", "cgroup")
            ],
            "resources": limits,
        },
    }


def _mounts(options: Options) -> list[dict[str, Any]]:
    shm = ["nosuid", "nodev", "mode=1777", f"size={options.shm_bytes}"]
    return [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        _tmpfs("/dev", ["nosuid", "mode=755", "size=65536k"]),
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
        _tmpfs("/dev/shm", shm),
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        *(_tmpfs(each, ["nosuid", "nodev", "mode=1777"]) for each in options.tmpfs),
        *(_bind(path, place) for path, place in options.volumes.items()),
    ]


def _tmpfs(place: str, options: list[str]) -> dict[str, Any]:
    return {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": options}


def _bind(path: Path, place: str) -> dict[str, Any]:
    return {"destination": place, "type": "bind", "source": str(path), "options": ["rbind", "rw"]}
