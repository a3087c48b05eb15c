"""Forecast: predicts the time of a load, so that users are warned before it begins.

The forecast uses the bytes to read and to download, a measured sample of this machine's reading
speed, and assumed values for the rest. Example: 25 GB at 1 GB/s, 11 s to start Ray and torch: 36 s.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from serve_app.config.settings import Settings
from serve_app.start_plan.memory import in_gb
from serve_app.start_plan.plan import StartPlan

SAMPLE_BYTES = 64 << 20
SAMPLE_LIMIT_S = 0.5
"""Maximum seconds for reading the sample."""
MIN_SAMPLE_BYTES = 4 << 20
"""Minimum bytes of a sample from which a speed is computed."""
START_S = 11.0
"""Seconds for starting Ray, importing torch and warming up the tiny model
(`benchmarks/results/start-tiny.json`, two cores)."""
GPU_START_S = 20.0
"""Assumed seconds for the same with CUDA, which includes compiling kernels and capturing steps."""
READ_BYTES_PER_S = 1e9
"""Assumed reading speed without a sample: the best speed of RunPod's volumes."""
DOWNLOAD_BYTES_PER_S = 2e8
QUANTIZE_BYTES_PER_S = 1e8
"""Bytes of float weights that two cores quantize per second (`benchmarks/results/forms-cpu.json`).
A GPU quantizes faster than a disk reads."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The work of a load, and the speed of this machine."""

    read_bytes: int
    download_bytes: int
    read_bytes_per_s: float
    is_measured: bool
    """Whether `read_bytes_per_s` is measured, not assumed."""
    quantizes: bool
    """Whether the load quantizes float weights to 4 bits."""
    on_cpu: bool

    @property
    def seconds(self) -> float:
        """Seconds from now until the model answers."""
        read_bytes_per_s = self.read_bytes_per_s
        if self.quantizes and self.on_cpu:
            read_bytes_per_s = min(read_bytes_per_s, QUANTIZE_BYTES_PER_S)
        download_s = self.download_bytes / DOWNLOAD_BYTES_PER_S
        start_s = START_S if self.on_cpu else GPU_START_S
        return start_s + download_s + self.read_bytes / read_bytes_per_s

    def sentence(self) -> str:
        """Returns the forecast as a sentence for the log."""
        speed_source = "measured" if self.is_measured else "assumed"
        download = ""
        if self.download_bytes:
            download = f"downloads {in_gb(self.download_bytes)} first, and "
        return (
            f"The load {download}{'reads and quantizes' if self.quantizes else 'reads'} "
            f"{in_gb(self.read_bytes)}, which takes about {self.seconds:.0f} s (reading "
            f"{self.read_bytes_per_s / 1e9:.2g} GB/s, {speed_source})."
        )

    def warning(self, settings: Settings) -> str | None:
        """Returns a warning with advice if the load takes longer than the platform waits; otherwise
        None."""
        is_eager = settings.runpod.start == "eager"
        runpod = settings.runpod
        limit = runpod.init_timeout_s if is_eager else runpod.execution_timeout_s
        if self.seconds <= limit:
            return None
        remedies = []
        if self.quantizes:
            remedies.append("convert the checkpoint to 4 bits (mixtral-serve convert)")
        if self.download_bytes:
            remedies.append("use a cached model, or download it onto a network volume first")
        if is_eager:
            limit_name = "the time in which a worker must start"
            remedies.append("raise RUNPOD_INIT_TIMEOUT")
        else:
            limit_name = "the endpoint's execution timeout, which runs while the first job waits"
            eager = "set `runpod.start` to eager"
            is_short = self.seconds > runpod.init_timeout_s
            remedies.append(f"{eager} and RUNPOD_INIT_TIMEOUT to more" if is_short else eager)
            remedies.append("raise the timeout and `runpod.execution_timeout_s` with it")
        return (
            f"Loading will take about {self.seconds:.0f} s, but {limit:.0f} s are {limit_name}: "
            f"{', or '.join(remedies)}."
        )


def predict(plan: StartPlan) -> Forecast:
    """Returns the forecast for `plan`. Reads a sample of the weights, for at most half a second."""
    on_cpu = plan.device == "cpu"
    if (repository := plan.repository) is not None:
        sizes = (repository.num_bytes, repository.missing_bytes)
        return Forecast(*sizes, READ_BYTES_PER_S, False, plan.quantizes, on_cpu)
    size = sum(file.stat().st_size for file in plan.files)
    measured = sample(plan.files)
    speed = READ_BYTES_PER_S if measured is None else measured
    return Forecast(size, 0, speed, measured is not None, plan.quantizes, on_cpu)


def sample(files: list[Path]) -> float | None:
    """Returns the reading speed of the largest of `files` in bytes per second; None if it is too
    small."""
    largest = max(files, key=lambda file: file.stat().st_size)
    room = largest.stat().st_size - SAMPLE_BYTES
    started, done = time.monotonic(), 0
    with largest.open("rb", buffering=0) as stream:
        # A random offset, because the sample of an earlier worker is in the page cache.
        stream.seek(random.randrange(room) if room > 0 else 0)
        while done < SAMPLE_BYTES and time.monotonic() - started < SAMPLE_LIMIT_S:
            if not (block := stream.read(1 << 20)):
                break
            done += len(block)
    seconds = time.monotonic() - started
    return done / seconds if done >= MIN_SAMPLE_BYTES and seconds > 0 else None
