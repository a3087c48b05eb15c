"""`mixtral-serve kernels`: compiles the CUDA kernels for GPUs that need not be here."""

import re
import time
from pathlib import Path

from serve_app.config.settings import ConfigError


def run(destination: Path, capabilities: list[str]) -> None:
    """Compiles for `capabilities`, such as "9.0", and prints what it did for each.

    Raises `ConfigError` for one that is none or that NVRTC does not know, where NVRTC is not
    installed, and for a folder that cannot be written.
    """
    from serve_app.model.config import MixtralConfig
    from serve_app.model.kernels.cuda.fill_cache import MIXTRAL_8X7B, fill_cache
    from serve_app.model.kernels.unavailable import StepUnavailable

    wanted = [_number(each) for each in capabilities]
    counts: dict[int, int] = {}

    def add(capability: int, name: str) -> None:
        counts[capability] = counts.get(capability, 0) + 1

    began = time.perf_counter()
    try:
        fill_cache(MixtralConfig.from_dict(MIXTRAL_8X7B), destination, wanted, add)
    except StepUnavailable as reason:
        raise ConfigError(f"The kernels cannot be compiled: {reason}.") from None
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be written ({error.strerror}).") from None
    for capability, count in counts.items():
        print(f"{capability / 10:.1f}: {count} kernels")
    print(f"{destination}: is complete after {time.perf_counter() - began:.0f} s.")


def _number(capability: str) -> int:
    """90 for "9.0"."""
    if re.fullmatch(r"\d+\.\d", capability) is None:
        raise ConfigError(f"{capability}: is no compute capability, such as 9.0.")
    return int(capability.replace(".", ""))
