"""Measures the time to the first answer of `mixtral-serve run tiny` and of an empty `serve run`.

    python -m benchmarks.start --repeats 5

    ours     `mixtral-serve run tiny`: the check, Ray, Serve, the load and the warm-up, until
             `/health` answers 200
    empty    `serve run` of a deployment that imports nothing, until it answers 200

Both start Ray on this machine without its dashboard and answer on port 8000, ours through HAProxy
and the empty one through Serve's own proxy. They run in turn: ours, empty, ours, empty. The target
is that ours answers first. One start of each comes before and does not count, so that all files are
in the page cache.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import new_parser, publish, say

ROOT = Path(__file__).parents[1]
OURS = [str(Path(sys.executable).with_name("mixtral-serve")), "run", "tiny"]
EMPTY = [sys.executable, "-m", "benchmarks.empty_app"]
COMMANDS = {"ours": (OURS, "/health"), "empty": (EMPTY, "/")}
PORT = 8000
POLL_S = 0.02
START_S = 120
END_S = 60


def start(command: list[str], path: str) -> dict[str, float]:
    """Starts `command`, waits for its answer, ends it: `{"seconds", "cpu_seconds"}` until then.

    `cpu_seconds` is processor time of all its processes that live then. Raises `RuntimeError` with
    its output if it ends or does not answer within `START_S`.
    """
    if _answers("/"):
        raise RuntimeError(f"Something else listens on port {PORT}.")
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        ) as process:
            try:
                while not _answers(path):
                    if process.poll() is not None or time.monotonic() - began > START_S:
                        log.seek(0)
                        raise RuntimeError(f"{command} does not answer:\n{log.read()}")
                    time.sleep(POLL_S)
                return {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_s(process.pid)}
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(END_S)


def _answers(path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", PORT, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _cpu_s(pid: int) -> float:
    """Returns the user and system seconds of a process and of those below it."""
    parent = psutil.Process(pid)
    times = [process.cpu_times() for process in [parent, *parent.children(recursive=True)]]
    return float(sum(it.user + it.system for it in times))


def compare(repeats: int) -> dict[str, Any]:
    """Starts each command `repeats` times, in turn: medians and every time, in seconds."""
    for command, path in COMMANDS.values():
        start(command, path)
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, (command, path) in COMMANDS.items():
            starts[name].append(start(command, path))
            say(f"{name:>6} {starts[name][-1]['seconds']:6.2f} s")
    result: dict[str, Any] = {}
    for name, ones in starts.items():
        result[name] = {
            "seconds": round(statistics.median(one["seconds"] for one in ones), 2),
            "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in ones), 2),
            "all_seconds": [round(one["seconds"], 2) for one in ones],
        }
    result["is_first"] = result["ours"]["seconds"] < result["empty"]["seconds"]
    return result


def main() -> int:
    """Returns the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", help="kept with the result: what else the machine did, say")
    options = parser.parse_args()
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    if options.note:
        figures["note"] = options.note
    publish("start", figures | compare(options.repeats), options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
