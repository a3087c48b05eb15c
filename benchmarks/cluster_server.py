"""`mixtral-serve run` with several replicas on this machine, and what each of them has done."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve_app.machine.ports import free_port
from tools.server_process import serving

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "tiny": [str(Path(sys.executable).with_name("mixtral-serve"))],
    "null": [sys.executable, "-m", "benchmarks.null_cluster"],
}
"""The command that starts a server of each model."""
REPLICA = "ray::ServeReplica:mixtral"
WAIT_S = 90.0
LOAD = "mixtral_load_phase_seconds"
TOKENS = "mixtral_generation_tokens"


@contextmanager
def server(
    model: str, replicas: int, folder: Path, *, haproxy: bool = True, keys: tuple[str, ...] = ()
) -> Iterator[int]:
    """Starts a server with `replicas` of the model, and yields its port when all of them run.

    `haproxy` or Serve's own proxy takes the requests.
    """
    document = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text())
    port = free_port()
    document["http_options"]["port"] = port
    # A small part of a processor each, so that Ray starts more replicas than there are processors.
    deployment = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 0.1}}
    document["applications"][0]["deployments"] = [{"name": "mixtral", **deployment}]
    config = folder / "cluster.yaml"
    config.write_text(yaml.safe_dump(document))
    command = [*COMMANDS[model], "run", str(config)]
    variables = {"RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0", "PYTHONPATH": str(ROOT)}
    if keys:
        variables["API_KEYS"] = ",".join(keys)
    first = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    url = f"http://127.0.0.1:{port}"
    key = keys[0] if keys else ""
    with serving(command, variables, url, first, folder / "log", key):
        wait_for_all(url, replicas)
        yield port


def wait_for_all(url: str, replicas: int) -> None:
    """Asks for metrics until each replica has answered; the first one runs before the others.

    Replicas differ in the seconds that their load took.
    """
    end = time.monotonic() + WAIT_S
    seen = set[str]()
    while len(seen) < replicas:
        if time.monotonic() > end:
            raise TimeoutError(f"{len(seen)} of {replicas} replicas answer")
        lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
        seen.add("".join(line for line in lines if line.startswith(LOAD)))


def replica_ports(pid: int | None = None) -> list[int]:
    """Returns the HTTP ports of the replicas below a process, this one by default; only in HAProxy
    mode."""
    ports = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(REPLICA):
                ports += [
                    each.laddr.port
                    for each in process.net_connections("tcp")
                    if each.status == psutil.CONN_LISTEN and is_ready(each.laddr.port)
                ]
    return ports


def is_ready(port: int) -> bool:
    """Returns whether a replica answers on the port. Ray's own ports do not answer HTTP."""
    with suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/ping", timeout=2).status_code == 200
    return False


def tokens_by_replica() -> dict[int, float]:
    """Returns the number of tokens that each replica has generated, by its port."""
    found = {}
    for port in replica_ports():
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
        families = {each.name: each for each in text_string_to_metric_families(text)}
        found[port] = families[TOKENS].samples[0].value
    return found


def loads(before: dict[int, float], after: dict[int, float]) -> dict[str, object]:
    """Returns the tokens of each replica between two calls of `tokens_by_replica`, and the spread:
    the highest number divided by the lowest, minus 1."""
    tokens = sorted(after[port] - before.get(port, 0.0) for port in after)
    spread = round(tokens[-1] / tokens[0] - 1, 3) if tokens and tokens[0] else None
    return {"tokens": tokens, "spread": spread}
