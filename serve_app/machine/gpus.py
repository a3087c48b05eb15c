"""Lists the NVIDIA GPUs of this machine and checks their driver, through NVML.

NVML creates no CUDA context, so a process that only forwards requests may call this. GPUs that
`CUDA_VISIBLE_DEVICES` hides are listed too. A GPU that is divided (MIG) is listed as its instances,
because CUDA gives a process one instance.
"""

import contextlib
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
MIN_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The first driver branch for each major version of CUDA (NVIDIA's CUDA release notes, table of
minor version compatibility)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The driver's description of one GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    """Free memory in bytes. Both sizes are 0 if the driver reports none, because the GPU shares the
    machine's memory or this process lacks the permission."""
    driver: str
    """The driver's version, such as "580.65.06"."""


class NoGpus(Exception):
    """NVML lists no GPU. The message is the reason in a few words."""


@functools.cache
def query_gpus() -> list[Gpu]:
    """Returns the GPUs, at least one. Raises `NoGpus`.

    A process queries NVML once, because a driver without a persistence daemon takes seconds to
    answer. So `free_bytes` is the value at the first call.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            driver = pynvml.nvmlSystemGetDriverVersion()
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            gpus = [_describe(part, driver) for handle in handles for part in _instances(handle)]
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise NoGpus(f"NVML: {error}") from None
    if not gpus:
        raise NoGpus("NVML lists none")
    return gpus


def _instances(handle: Any) -> list[Any]:
    """Returns the handles of the instances into which a GPU is divided, or its own."""
    import pynvml

    try:
        is_divided = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_divided else 0
    except pynvml.NVMLError:  # a GPU that cannot be divided
        return [handle]
    instances = []
    for number in range(count):
        with contextlib.suppress(pynvml.NVMLError_NotFound):  # fewer are made than there may be
            instances.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
    return instances or [handle]


def _describe(handle: object, driver: str) -> Gpu:
    import pynvml

    total = free = 0
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        pass  # it shares the machine's memory, or it is divided and the process has no instance
    return Gpu(pynvml.nvmlDeviceGetName(handle), total, free, driver)


def find_gpus() -> list[Gpu]:
    """Returns the GPUs, or an empty list if NVML lists none."""
    try:
        return query_gpus()
    except NoGpus:
        return []


def torch_cuda_version() -> str | None:
    """Returns the version of CUDA that the installed torch is built for; None for a CPU build.

    Reads torch's version file, because importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return match[1] if match else None


def driver_problem(gpu: Gpu, cuda: str) -> str | None:
    """Returns an error sentence if the driver is too old for CUDA version `cuda`; otherwise
    None."""
    minimum = MIN_DRIVERS.get(int(cuda.partition(".")[0]))
    branch = gpu.driver.partition(".")[0]
    if minimum is None or not branch.isdecimal() or int(branch) >= minimum:
        return None
    return (
        f"The driver is too old: {gpu.name} has driver {gpu.driver}, and this image's CUDA {cuda} "
        f"needs {minimum} or newer; choose hosts with a newer driver (CUDA version filter of the "
        "endpoint), or an image for an older CUDA."
    )
