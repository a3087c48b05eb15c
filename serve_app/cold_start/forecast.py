"""How long the model will take to load, said before it is loaded.

From the bytes to read and to download, a sample of this machine's own reading speed, and figures
for the rest that are assumed and said so. No promise: it is there to be warned in time.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

from serve_app.app import is_on_cpu
from serve_app.config.settings import Settings
from serve_app.loading.load import reading_phase
from serve_app.loading.phases import Phase
from serve_app.start_plan.memory import in_gb

SAMPLE_BYTES = 64 << 20
SAMPLE_S = 0.5
"""The sample is read for so long at most."""
LEAST_SAMPLE_BYTES = 4 << 20
"""Of less, nothing is concluded."""
START_S = 20.0
"""Assumed for Ray, the import of torch and the warm-up."""
READ_BYTES_S = 1e9
"""Assumed where there is no sample: what RunPod's volumes reach at best."""
DOWNLOAD_BYTES_S = 2e8
QUANTISE_BYTES_S = 1e8
"""Floats quantised by two cores (`benchmarks/results/forms-cpu.json`); a GPU reads as fast as
the disk."""
INIT_S = 420.0
"""What the platform gives a worker to come up, by default."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is to be done, and how fast it goes."""

    read_bytes: int
    download_bytes: int
    read_bytes_s: float
    is_measured: bool
    """Whether `read_bytes_s` is this machine's own."""
    quantises: bool
    """Floats become 4 bits on the way."""
    on_cpu: bool

    @property
    def seconds(self) -> float:
        slowest = min(self.read_bytes_s, QUANTISE_BYTES_S) if self._is_slow else self.read_bytes_s
        return START_S + self.download_bytes / DOWNLOAD_BYTES_S + self.read_bytes / slowest

    @property
    def _is_slow(self) -> bool:
        return self.quantises and self.on_cpu

    def sentence(self) -> str:
        """What is about to happen."""
        known = "measured" if self.is_measured else "assumed"
        download = ""
        if self.download_bytes:
            download = f"downloads {in_gb(self.download_bytes)} first, and "
        return (
            f"The load {download}{'reads and quantises' if self.quantises else 'reads'} "
            f"{in_gb(self.read_bytes)}, which takes about {self.seconds:.0f} s (reading "
            f"{self.read_bytes_s / 1e9:.2g} GB/s, {known})."
        )

    def warning(self, settings: Settings) -> str | None:
        """What to do where that is longer than the platform waits; None where it is not."""
        is_eager = settings.runpod.start == "eager"
        limit = INIT_S if is_eager else settings.runpod.execution_timeout_s
        if self.seconds <= limit:
            return None
        remedies = []
        if self.quantises:
            remedies.append("convert the checkpoint to 4 bits (python -m serve_app.convert)")
        if self.download_bytes:
            remedies.append("download the model onto a network volume beforehand")
        if is_eager:
            what = "what a worker has to come up"
            remedies.append("raise RUNPOD_INIT_TIMEOUT")
        else:
            what = "the endpoint's execution timeout, which runs while the first job waits"
            remedies.append("set `runpod.start` to eager")
            remedies.append("raise the timeout and `runpod.execution_timeout_s` with it")
        return (
            f"Loading will take about {self.seconds:.0f} s, and {limit:.0f} s are {what}: "
            f"{', or '.join(remedies)}."
        )


def predict(settings: Settings, folder: Path | None, files: list[Path]) -> Forecast:
    """The forecast for the checkpoint in `folder` with weights in `files`; None: for the hub's.

    Reads a sample of the weights, for half a second at most, or asks the hub, raising as `look_up`.
    """
    on_cpu = is_on_cpu(settings)
    if folder is None:
        size, missing, is_float = _on_the_hub(settings)
        quantises = is_float and settings.model.quantization != "none"
        return Forecast(size, missing, READ_BYTES_S, False, quantises, on_cpu)
    quantises = reading_phase(settings, folder) is Phase.READ_AND_QUANTIZE
    rate, size = sample(files), sum(file.stat().st_size for file in files)
    return Forecast(size, 0, rate or READ_BYTES_S, rate is not None, quantises, on_cpu)


def sample(files: list[Path]) -> float | None:
    """Bytes per second of a read somewhere in `files`; None where there is too little to read."""
    largest = max(files, key=lambda file: file.stat().st_size)
    room = largest.stat().st_size - SAMPLE_BYTES
    begun, done = time.monotonic(), 0
    with largest.open("rb", buffering=0) as stream:
        # Anywhere, so that it is not what an earlier worker's sample has left in the page cache.
        stream.seek(random.randrange(room) if room > 0 else 0)
        while done < SAMPLE_BYTES and time.monotonic() - begun < SAMPLE_S:
            if not (block := stream.read(1 << 20)):
                break
            done += len(block)
    seconds = time.monotonic() - begun
    return done / seconds if done >= LEAST_SAMPLE_BYTES and seconds > 0 else None


def _on_the_hub(settings: Settings) -> tuple[int, int, bool]:
    """Bytes of the repository, those still missing here, and whether its weights are floats."""
    from serve_app.model.checkpoint.find import download_cache
    from serve_app.model.checkpoint.form import stored_form
    from serve_app.start_plan.hub import look_up

    chosen = settings.model
    token = chosen.hf_token.get_secret_value() if chosen.hf_token else None
    hub = download_cache(Path(settings.runpod.volume))
    found = look_up(chosen.name, chosen.revision, token, hub)
    return found.nbytes, found.missing_bytes, stored_form(found.config) == "float"
