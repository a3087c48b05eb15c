"""The GPUs of this machine and their driver, as `nvidia-smi` tells of them.

Imports no torch, which would take a CUDA context. Knows nothing of models.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
TIMEOUT_S = 20.0
"""A driver that is being initialised takes a few seconds."""
LEAST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The first driver branch for each major version of CUDA (NVIDIA's CUDA release notes, table of
minor version compatibility)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver describes it."""

    name: str
    total_bytes: int
    free_bytes: int
    """0 where it shares its memory with the machine and tells no size, as `total_bytes`."""
    driver: str
    """Such as "580.65.06"."""


class NoGpus(Exception):
    """Why no GPU could be listed, in a few words."""


def query_gpus() -> list[Gpu]:
    """The GPUs, one at least; raises `NoGpus`. Asks once: what is free is of the first time."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise NoGpus("no nvidia-smi")
    return _query(program, Path(program).stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _query(program: str, changed: int) -> list[Gpu]:
    # Without a daemon that keeps the driver awake, an answer can take seconds.
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    try:
        listed = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        said = (error.stdout + error.stderr).strip().splitlines() or [f"exit {error.returncode}"]
        raise NoGpus(f"nvidia-smi: {said[0].strip()[:200]}") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise NoGpus(f"nvidia-smi: {type(error).__name__}") from None
    rows = [line.rsplit(",", 3) for line in listed.splitlines() if line.count(",") >= 3]
    if not rows:
        raise NoGpus("nvidia-smi lists none")
    return [
        Gpu(name.strip(), _mib(total), _mib(free), driver.strip())
        for name, total, free, driver in rows
    ]


def find_gpus() -> list[Gpu]:
    """The GPUs; none where they cannot be listed, whyever."""
    try:
        return query_gpus()
    except NoGpus:
        return []


def torchs_cuda() -> str | None:
    """The version of CUDA that the installed torch is built for; None: for none.

    From torch's own version file, because importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def driver_problem(gpu: Gpu, cuda: str) -> str | None:
    """A sentence where the driver is too old for this version of CUDA; else None."""
    least = LEAST_DRIVERS.get(int(cuda.partition(".")[0]))
    branch = gpu.driver.partition(".")[0]
    if least is None or not branch.isdecimal() or int(branch) >= least:
        return None
    return (
        f"The driver is too old: {gpu.name} has driver {gpu.driver}, and this image's CUDA {cuda} "
        f"needs {least} or newer; choose hosts with a newer driver (CUDA version filter of the "
        "endpoint), or an image for an older CUDA."
    )


def _mib(text: str) -> int:
    return int(text) * MIB if text.strip().isdecimal() else 0
