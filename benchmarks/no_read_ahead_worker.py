"""The worker without reading ahead, otherwise `runpod_entry.py`, for `benchmarks.coldstart`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import runpod_entry
from serve_app.cold_start import read_ahead


def nothing(files: Sequence[Path], load_log: str | None, stop: Event) -> int:
    """Replaces `read_ahead.read`."""
    return 0


if __name__ == "__main__":
    read_ahead.read = nothing
    sys.exit(runpod_entry.main())
