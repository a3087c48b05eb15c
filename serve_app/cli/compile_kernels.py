"""`mixtral-serve kernels`: compiles the CUDA kernels for several GPUs, on a machine without one."""

import re
import time
from pathlib import Path

from serve_app.config.settings import ConfigError


def run(destination: Path, capabilities: list[str]) -> None:
    """Compiles for `capabilities`, such as "9.0", and prints a line for each.

    Raises `ConfigError` if a capability is invalid or unknown to NVRTC, if NVRTC is not installed,
    or if the folder cannot be written.
    """
    from serve_app.model.config import MixtralConfig
    from serve_app.model.kernels.cuda.fill_cache import MIXTRAL_8X7B, fill_cache
    from serve_app.model.kernels.unavailable import StepUnavailable

    versions = [_number(capability) for capability in capabilities]
    counts: dict[int, int] = {}

    def add(capability: int, name: str) -> None:
        counts[capability] = counts.get(capability, 0) + 1

    began = time.perf_counter()
    try:
        fill_cache(MixtralConfig.from_dict(MIXTRAL_8X7B), destination, versions, add)
    except StepUnavailable as reason:
        raise ConfigError(f"The kernels cannot be compiled: {reason}.") from None
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be written ({error.strerror}).") from None
    for capability, count in counts.items():
        print(f"{capability / 10:.1f}: {count} kernels")
    print(f"{destination} is complete after {time.perf_counter() - began:.0f} s.")


def _number(capability: str) -> int:
    """Returns the capability as a number: 90 for "9.0"."""
    if re.fullmatch(r"\d+\.\d", capability) is None:
        raise ConfigError(f"{capability} is not a compute capability such as 9.0.")
    return int(capability.replace(".", ""))
