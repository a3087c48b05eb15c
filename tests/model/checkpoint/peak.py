"""`python -m tests.model.checkpoint.peak FOLDER`: prints the peak memory of a load in nf4.

One JSON line: {"host": bytes above what the process had, "device": bytes on the GPU, null without
one, "model": bytes of the loaded weights}.
"""

import json
import sys
from pathlib import Path

import torch

from serve_app.model.checkpoint.loader import bytes_by_part
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantization import Quantization
from serve_app.tiny import CHECKPOINT
from tests.model.driver import load_folder


def memory(line: str) -> int:
    """Returns the bytes of this process: VmRSS, what it has, or VmHWM, the most that it had."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise AssertionError(line)


def load_nf4(folder: Path) -> Mixtral:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_folder(folder, torch.bfloat16, Quantization("nf4", "nested"), device=device)


if __name__ == "__main__":
    load_nf4(CHECKPOINT)  # libraries, threads and a CUDA context are not the checkpoint's
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    model = load_nf4(Path(sys.argv[1]))
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    sizes = sum(bytes_by_part(model).values())
    print(json.dumps({"host": memory("VmHWM") - before, "device": device, "model": sizes}))
