"""A fake NVML: a module with the functions of `pynvml` that `serve_app.machine.gpus` calls."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from serve_app.machine.gpus import query_gpus

SOURCE = """
from types import SimpleNamespace

class NVMLError(Exception): ...
class NVMLError_NotSupported(NVMLError): ...
class NVMLError_NotFound(NVMLError): ...
class NVMLError_NoPermission(NVMLError): ...
NVML_DEVICE_MIG_ENABLE = 1

GPUS, DRIVER, FAILURE = {gpus!r}, {driver!r}, {failure!r}
is_open = False

def nvmlInit():
    global is_open
    if FAILURE is not None:
        raise NVMLError(FAILURE)
    is_open = True

def nvmlShutdown():
    global is_open
    assert is_open
    is_open = False

def nvmlSystemGetDriverVersion():
    assert is_open
    return DRIVER

def nvmlDeviceGetCount():
    return len(GPUS)

def nvmlDeviceGetHandleByIndex(index):
    return GPUS[index]

def nvmlDeviceGetName(handle):
    return handle[0]

def nvmlDeviceGetMigMode(handle):
    if len(handle) < 4:
        raise NVMLError_NotSupported("Not Supported")
    return [1, 1]

def nvmlDeviceGetMaxMigDeviceCount(handle):
    return 7

def nvmlDeviceGetMigDeviceHandleByIndex(handle, index):
    if index >= len(handle[3]):
        raise NVMLError_NotFound("Not Found")
    return handle[3][index]

def nvmlDeviceGetMemoryInfo(handle):
    total, free = handle[1:3]
    if len(handle) == 4:
        raise NVMLError_NoPermission("Insufficient Permissions")
    if total is None:
        raise NVMLError_NotSupported("Not Supported")
    return SimpleNamespace(total=total << 20, free=free << 20)
"""

Row = tuple[str, int | None, int | None] | tuple[str, int | None, int | None, tuple["Row", ...]]
"""A GPU: its name, its memory in MiB, and how much of it is free. None: it reports no size. A GPU
that is divided has its instances as well."""
RTX_5090: Row = ("NVIDIA GeForce RTX 5090", 32607, 32100)
RTX_4090: Row = ("NVIDIA GeForce RTX 4090", 24564, 24100)

Install = Callable[..., ModuleType]


def source(*gpus: Row, driver: str = "580.65.06", failure: str | None = None) -> str:
    """Returns the module's text. With `failure`, NVML cannot be initialized."""
    return SOURCE.format(gpus=gpus, driver=driver, failure=failure)


def write(folder: Path, *gpus: Row, driver: str) -> None:
    """Writes the module into `folder`, for processes that have it on their PYTHONPATH."""
    (folder / "pynvml.py").write_text(source(*gpus, driver=driver))


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a fake NVML in this process, with the arguments of `source`; may be called again."""

    def install(*gpus: Row, driver: str = "580.65.06", failure: str | None = None) -> ModuleType:
        module = ModuleType("pynvml")
        exec(source(*gpus, driver=driver, failure=failure), module.__dict__)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        query_gpus.cache_clear()
        return module

    yield install
    query_gpus.cache_clear()
