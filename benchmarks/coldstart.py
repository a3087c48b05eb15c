"""Cold start of a RunPod worker: from the start of its process to its first answer, by phase.

    python -m benchmarks.coldstart --gb 4

    tiny     The real worker with RunPod's SDK and the tiny model, against the platform on loopback.
             A job waits; the time ends when it is answered. Beside it, by turns, an empty Serve
             deployment that imports torch, until it answers. The target is that the worker takes at
             most 3 s more, plus the time to read the weights.
    ahead    The worker on a synthetic checkpoint in our 4-bit form, made from `--gb` gigabytes of
             bfloat16, which the page cache does not hold: with and without reading ahead.

`benchmarks.forms` measures how fast a checkpoint loads without a server. Programs and libraries are
in the page cache here, so the first start of a container takes longer.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.forms import forget, read_plainly, write_forms
from benchmarks.report import new_parser, publish
from emulator import client_api
from emulator.platform import Platform
from emulator.worker import ENTRY, Worker
from serve_app.machine.gpus import find_gpus
from serve_app.tiny import CHECKPOINT

TINY = ENTRY.parent / "configs" / "tiny.yaml"
EMPTY = Path(__file__).with_name("empty_deployment.py")
UNREAD = Path(__file__).with_name("no_read_ahead_worker.py")
TARGET_S = 3.0
JOB_POLL_S = 0.01


def start_worker(config: Path, script: Path = ENTRY) -> dict[str, Any]:
    """Measures one cold start with a job waiting: `{"total_s", "phases": {phase: seconds}}`."""
    home = Path(tempfile.mkdtemp(prefix="coldstart-"))
    with Platform() as platform:
        job = _submit(platform, {"prompt": "What is 2 + 3?", "max_tokens": 1, "temperature": 0})
        began = time.monotonic()
        with Worker(platform, home, script=script, SERVE_CONFIG=str(config)) as worker:
            while not job.is_over:
                if worker.process.poll() is not None:
                    raise RuntimeError(worker.log)
                time.sleep(JOB_POLL_S)
            total_s = time.monotonic() - began
            if job.status != "COMPLETED":
                raise RuntimeError(f"{job.error}\n{worker.log}")
            health = _submit(platform, {"endpoint": "/health"})
            while not health.is_over:
                time.sleep(JOB_POLL_S)
    shutil.rmtree(home)
    phases = {it["phase"]: it["seconds"] for it in health.output["load"]}
    return {"total_s": total_s, "phases": phases}


def start_empty() -> float:
    """Returns the seconds from the start of the empty deployment's process to its answer."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, str(EMPTY)], stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        for line in one.stdout:
            if line == "ready\n":
                seconds = time.monotonic() - began
        one.wait()
    return seconds


def _submit(platform: Platform, given: dict[str, Any]) -> Any:
    headers = {"Authorization": f"Bearer {client_api.KEY}"}
    answer = requests.post(f"{platform.url}/v2/ep/run", json={"input": given}, headers=headers)
    return platform.queue.jobs[answer.json()["id"]]


def compare(repeats: int) -> dict[str, Any]:
    """Measures the worker with the tiny model and the empty deployment alternately. Returns
    medians."""
    start_empty()  # brings everything into the page cache
    workers, empties = [], []
    for _ in range(repeats):
        workers.append(start_worker(TINY))
        empties.append(start_empty())
    forget(CHECKPOINT)
    read_s = read_plainly(CHECKPOINT)
    total_s = statistics.median(one["total_s"] for one in workers)
    empty_s = statistics.median(empties)
    phases = _median_phases(workers)
    _show(phases)
    more_s = total_s - empty_s - read_s
    print(
        f"worker {total_s:.2f} s, empty deployment {empty_s:.2f} s, read {read_s:.2f} s: "
        f"{more_s:.2f} s more (target {TARGET_S:g})"
    )
    return {
        "worker_s": round(total_s, 3),
        "empty_s": round(empty_s, 3),
        "read_s": round(read_s, 3),
        "more_s": round(more_s, 3),
        "target_s": TARGET_S,
        "phases": phases,
        "all_worker_s": [round(one["total_s"], 3) for one in workers],
        "all_empty_s": [round(seconds, 3) for seconds in empties],
    }


def compare_ahead(folder: Path, gb: float, repeats: int) -> dict[str, Any]:
    """Measures the worker with and without reading ahead; the page cache has no checkpoint."""
    forms, _ = write_forms(folder, gb)
    checkpoint = forms.pop("fused")
    for other in forms.values():
        shutil.rmtree(other)
    for file in CHECKPOINT.glob("*token*"):
        shutil.copy(file, checkpoint)
    config = _config(folder, checkpoint)
    scripts = {"ahead": ENTRY, "without": UNREAD}
    starts: dict[str, list[dict[str, Any]]] = {name: [] for name in scripts}
    reads = []
    for _ in range(repeats):
        for name, script in scripts.items():
            forget(checkpoint)
            starts[name].append(start_worker(config, script))
        forget(checkpoint)
        reads.append(read_plainly(checkpoint))
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    result: dict[str, Any] = {
        "gb": round(size / 1e9, 3),
        "plain_read_s": round(statistics.median(reads), 3),
    }
    for name, ones in starts.items():
        phases = _median_phases(ones)
        total_s = statistics.median(one["total_s"] for one in ones)
        print(
            f"{name:>8}: {total_s:.2f} s to the first answer, {phases['read']:.2f} s of it reading"
        )
        result[name] = {
            "total_s": round(total_s, 3),
            "read_s": phases["read"],
            "all_total_s": [round(one["total_s"], 3) for one in ones],
            "all_read_s": [one["phases"]["read"] for one in ones],
        }
    return result


def _config(folder: Path, checkpoint: Path) -> Path:
    document = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    args = document["applications"][0]["args"]
    args["model"] |= {"name": str(checkpoint), "quantization": "nf4", "dtype": "bfloat16"}
    args["model"]["device"] = "cuda" if find_gpus() else "cpu"
    args["engine"] = {"max_model_len": 256, "kv_cache_tokens": 1024}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _median_phases(starts: list[dict[str, Any]]) -> dict[str, float]:
    names = starts[0]["phases"]
    return {
        name: round(statistics.median(one["phases"][name] for one in starts), 3) for name in names
    }


def _show(phases: dict[str, float]) -> None:
    for name, seconds in phases.items():
        print(f"{name:>14} {seconds:7.2f} s")


def main() -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--gb", type=float, help="also measure reading ahead")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default a new one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", help="kept with the result: what else the machine did, say")
    options = parser.parse_args()
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    if options.note:
        figures["note"] = options.note
    figures["tiny"] = compare(options.repeats)
    if options.gb is not None:
        folder = Path(tempfile.mkdtemp(prefix="coldstart-", dir=options.folder))
        try:
            figures["ahead"] = compare_ahead(folder, options.gb, options.repeats)
        finally:
            shutil.rmtree(folder)
    publish("coldstart", figures, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
