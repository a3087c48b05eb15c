"""`mixtral-serve run tiny` with its defaults and an API key, and what can be measured beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

from benchmarks.polite_clients import KEY

ROOT = Path(__file__).parents[1]
COMMAND = [str(Path(sys.executable).with_name("mixtral-serve")), "run", "tiny"]
PORT = 8000
START_S = 180
LAG = "mixtral_event_loop_lag_seconds_bucket"


class Server:
    """One running server; `proxy` is "haproxy", the default, or "serve"."""

    def __init__(self, proxy: str, log: Path) -> None:
        """Starts the server and waits until it is ready. Raises `RuntimeError` with its log if it
        does not start."""
        self.port = PORT
        self._log = log
        is_haproxy = "1" if proxy == "haproxy" else "0"
        environment = os.environ | {"API_KEYS": KEY, "RAY_SERVE_ENABLE_HA_PROXY": is_haproxy}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                COMMAND, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        end = time.monotonic() + START_S
        while self._get("/health") is None:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"{COMMAND} does not answer:\n{log.read_text()}")
            time.sleep(0.2)

    def max_clients(self) -> int:
        """Returns the number of places in the engine's queue, from the settings' defaults."""
        from serve_app.config.settings import Settings

        engine = Settings.from_yaml("configs/tiny.yaml").engine
        return engine.max_num_seqs + engine.max_waiting

    def replica_bytes(self) -> int:
        """Returns the resident bytes of the replica; 0 if there is none."""
        for process in psutil.process_iter(["cmdline", "memory_info"]):
            command = " ".join(process.info["cmdline"] or ())
            if command.startswith("ray::ServeReplica") and self._is_ours(process):
                return int(process.info["memory_info"].rss)
        return 0

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return self.process.pid in [parent.pid for parent in process.parents()]
        except psutil.Error:
            return False

    def lag_buckets(self) -> dict[float, float]:
        """Returns the histogram of the replica's event-loop lag: cumulative counts by upper bound
        in s."""
        buckets = {}
        for line in (self._get("/metrics") or "").splitlines():
            if line.startswith(LAG):
                bound = line.split('le="')[1].split('"')[0]
                buckets[float(bound)] = float(line.rsplit(" ", 1)[1])
        return buckets

    def stop(self) -> int:
        """Sends SIGTERM and waits; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def kill(self) -> None:
        """Ends it in any case."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def errors_in_log(self) -> int:
        """Returns the lines with a traceback or an error."""
        return sum(
            "Traceback" in line or " ERROR " in line for line in self._log.read_text().splitlines()
        )

    def _get(self, path: str) -> str | None:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.read().decode() if response.status == 200 else None
        except (OSError, HTTPException):
            return None
        finally:
            connection.close()


def lag_p99_ms(before: dict[float, float], after: dict[float, float]) -> float | None:
    """Returns the bucket's bound below which 99 % of the lags between two scrapes are, in ms."""
    counts = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    total = max(counts.values(), default=0.0)
    if not total:
        return None
    return next(bound * 1000 for bound in sorted(counts) if counts[bound] >= 0.99 * total)


@contextmanager
def probing(port: int) -> Iterator[dict[str, Any]]:
    """Probes `/ping` and `/health` meanwhile; the dict has the figures at the end."""
    found: dict[str, Any] = {}
    command = [sys.executable, "-m", "benchmarks.ping_probe", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            yield found
        finally:
            output, _ = process.communicate()
            found |= json.loads(output)


@contextmanager
def attacking(names: list[str], port: int) -> Iterator[None]:
    """Runs attacks meanwhile, each in a process of its own."""
    processes = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.attacks", name, str(port)], cwd=ROOT)
        for name in names
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
