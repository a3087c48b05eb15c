"""BoxServer: `mixtral-serve run` on one checkpoint, started cold, and the phases of its load."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import requests
import yaml

from benchmarks.forms import forget, read_plainly
from benchmarks.report import say
from benchmarks.running_server import RunningServer
from serve_app.machine.gpus import find_gpus
from serve_app.machine.ports import free_port
from tools.server_process import serving

CONFIGS = Path(__file__).parents[1] / "serve_app" / "configs"
MODEL = "box"
TEMPERATURE = 0.7
"""Greedy answers of random weights fall into loops, in which all streams hit the same experts."""


@dataclass(frozen=True)
class Box:
    """The served checkpoint and its folder."""

    checkpoint: Path
    folder: Path
    """For the configuration and the server's log."""
    max_num_seqs: int
    max_model_len: int

    def config(self, port: int, caches: Path) -> dict[str, Any]:
        """Returns the Serve YAML: `configs/local.yaml`, or without a GPU `configs/tiny.yaml`, with
        this checkpoint and these limits."""
        has_gpu = bool(find_gpus())
        file = CONFIGS / ("local.yaml" if has_gpu else "tiny.yaml")
        document: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        document["http_options"] = {"host": "127.0.0.1", "port": port}
        document["applications"][0]["args"] = {
            "model": {
                "name": str(self.checkpoint),
                "served_model_name": MODEL,
                "device": "cuda" if has_gpu else "cpu",
                "cache_dir": str(caches),
            },
            "engine": {"max_num_seqs": self.max_num_seqs, "max_model_len": self.max_model_len},
        }
        return document

    @contextmanager
    def cold(self) -> Iterator[tuple[RunningServer, dict[str, Any]]]:
        """Yields a server that was started without its files in the page cache and without compiled
        kernels, and the numbers of its start. Raises `ServerError` if it does not start."""
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        server = RunningServer(url, MODEL, {"ignore_eos": True, "temperature": TEMPERATURE})
        with TemporaryDirectory(dir=self.folder) as caches:
            file = self.folder / "box.yaml"
            file.write_text(yaml.safe_dump(self.config(port, Path(caches))), encoding="utf-8")
            command = [str(Path(sys.executable).with_name("mixtral-serve")), "run", str(file)]
            variables = {"TRITON_CACHE_DIR": f"{caches}/triton"}
            forget(self.checkpoint)
            read_s = read_plainly(self.checkpoint)
            forget(self.checkpoint)
            log = self.folder / "server.log"
            log.unlink(missing_ok=True)
            with serving(command, variables, url, server.body("Hi", 1), log) as seconds:
                yield server, self._start(url, seconds, read_s)

    def _start(self, url: str, seconds: float, read_s: float) -> dict[str, Any]:
        """Prints and returns the figures of a start."""
        health = requests.get(f"{url}/health", timeout=60).json()
        gb = sum(file.stat().st_size for file in self.checkpoint.glob("*.safetensors")) / 1e9
        phases = {it["phase"]: it["seconds"] for it in health["load"]}
        say(f"{seconds:.1f} s from the start of the process to the first answer:")
        for phase, took in phases.items():
            speed = f"   {gb / took:.2f} GB/s" if phase == "read" and took else ""
            say(f"{phase:>16} {took:8.2f} s{speed}")
        say(f"{'plain read':>16} {read_s:8.2f} s   {gb / read_s:.2f} GB/s by one thread")
        return {
            "first_answer_s": round(seconds, 1),
            "phases": phases,
            "gb": round(gb, 3),
            "plain_read_s": round(read_s, 3),
            "notes": health["notes"],
            "memory": health["memory"],
        }
