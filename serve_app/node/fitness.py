"""Checks whether this machine can serve the model, before it accepts jobs or requests.

If a check fails, the SDK reports the worker as unhealthy and ends it with code 1
(`register_fitness_check`), so that the platform tries another machine. If the cause is the model or
its name, the jobs fail instead. Every check takes milliseconds, imports no torch, and raises
`MachineUnfit` with one sentence that says what to do.
"""

import logging
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

from serve_app.cold_start.killed import LOADER_BYTES
from serve_app.config.settings import Settings
from serve_app.errors import MachineUnfit, ModelLoadFailed
from serve_app.machine.gpus import NoGpus, driver_problem, query_gpus, torch_cuda_version
from serve_app.machine.host import free_bytes
from serve_app.machine.volume import is_mounted, volume_folder
from serve_app.node.ray_node import OBJECT_STORE_BYTES
from serve_app.start_plan.device import Device, choose_device

log = logging.getLogger(__name__)

Check = Callable[[], None]
"""Raises `MachineUnfit`."""

SHARED_MEMORY = Path("/dev/shm")
MIN_OPEN_FILES = 256
"""Number of open files that each process of Ray and HAProxy needs; macOS allows no more."""
SCRATCH = Path("/tmp")
SCRATCH_BYTES = 1_000_000_000
"""Bytes that Ray's session and its logs need."""


def checks(settings: Settings, failure: ModelLoadFailed | None) -> list[Check]:
    """Returns all checks. `failure` is the error of `cold_start.check`, or None."""
    device = choose_device(settings.model)

    def gpu_driver() -> None:
        require_driver(device)

    def memory() -> None:
        require_memory(device, LOADER_BYTES)

    def shared_memory() -> None:
        require_shared_memory(SHARED_MEMORY, OBJECT_STORE_BYTES)

    def open_files() -> None:
        require_open_files(MIN_OPEN_FILES)

    def disk() -> None:
        require_disk(SCRATCH, SCRATCH_BYTES)

    def model_folder() -> None:
        require_folder(settings)

    def found() -> None:
        if isinstance(failure, MachineUnfit):
            raise failure

    if isinstance(failure, MachineUnfit):
        found.__name__ = failure.check  # the name that the platform shows
    return [gpu_driver, memory, shared_memory, open_files, disk, model_folder, found]


def first_problem(checks: list[Check]) -> MachineUnfit | None:
    """Returns the error of the first check that fails, or None."""
    for check in checks:
        try:
            check()
        except MachineUnfit as problem:
            return problem
    return None


def require_room_for_ray() -> None:
    """Runs the checks that need no configuration. Raises `MachineUnfit` if Ray cannot start."""
    require_open_files(MIN_OPEN_FILES)
    require_shared_memory(SHARED_MEMORY, OBJECT_STORE_BYTES)
    require_disk(SCRATCH, SCRATCH_BYTES)


def require_driver(device: Device) -> None:
    """Raises `MachineUnfit` if a GPU is needed but missing, or if its driver is too old."""
    if device == "cpu":
        return
    try:
        gpus = query_gpus()
    except NoGpus as reason:
        raise MachineUnfit(
            f"The model needs a GPU, but none was found ({reason}); choose another host, or set "
            "`model.device` to cpu."
        ) from None
    cuda = torch_cuda_version()
    for gpu in gpus:
        if cuda is not None and (problem := driver_problem(gpu, cuda)) is not None:
            raise MachineUnfit(problem)


def require_memory(device: Device, num_bytes: int) -> None:
    """Raises `MachineUnfit` if there is too little main memory for a load onto the GPU."""
    if device == "cuda" and (free := free_bytes()) < num_bytes:
        raise MachineUnfit(
            f"{free / 1e9:.2f} GB of main memory are free, but a load onto a GPU needs about "
            f"{num_bytes / 1e9:.0f} GB; use a machine with more memory."
        )


def require_shared_memory(folder: Path, num_bytes: int) -> None:
    """Raises `MachineUnfit` if Ray's object store has no room in shared memory."""
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    if free < num_bytes:
        raise MachineUnfit(
            f"{folder} has {free / 1e6:.0f} MB free, but Ray needs {num_bytes / 1e6:.0f} MB; start "
            "the container with a larger one (--shm-size)."
        )


def require_open_files(num_files: int) -> None:
    """Raises `MachineUnfit` if a process may not open `num_files` files."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < num_files:
        raise MachineUnfit(
            f"A process may open {limit} files, but Ray needs {num_files}; raise the limit "
            "(`ulimit -n 65536`, or --ulimit nofile=65536 of a container)."
        )


def require_disk(folder: Path, num_bytes: int) -> None:
    """Raises `MachineUnfit` if the container's disk is full."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MachineUnfit(
            f"The disk of {folder} is full: {free / 1e6:.0f} MB are free, but Ray needs "
            f"{num_bytes / 1e6:.0f} MB for its session; raise the container's disk."
        )


def require_folder(settings: Settings) -> None:
    """Raises `MachineUnfit` if `model.name` is a path and nothing is there."""
    name = settings.model.name
    if name.startswith(("/", "./", "../", "~")) and not Path(name).expanduser().is_dir():
        volume = volume_folder(settings.runpod.volume)
        is_lost = Path(name).is_relative_to(volume) and not is_mounted(volume)
        reason = f"the volume {volume} is not mounted" if is_lost else "there is no such folder"
        raise MachineUnfit(f"{name}: {reason}; `model.name` must be the model's folder.")
