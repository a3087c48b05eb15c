"""A cluster of a head and two workers under load, of which parts are killed; and one that grows.

The cluster is that of tests/cluster, started by the scripts of cluster/ray: HAProxy on each node,
the tiny model in two replicas, one on each worker.
"""

import time
from collections.abc import Callable
from typing import Any

import psutil

from benchmarks.cluster_clients import WHOLE, Clients, failures
from benchmarks.cluster_server import REPLICA, replica_ports
from benchmarks.report import say
from tests.cluster.plain_ray import KEY, SCALING, Cluster
from tests.processes import all_below

CLIENTS = 8
TOKENS = 32
LIMIT_S = 90.0
SETTLED_S = 2.0
"""Seconds without a failed request after which the cluster has recovered."""
DEPLOYMENT: dict[str, Any] = {"graceful_shutdown_timeout_s": 30}


def until(is_true: Callable[[], Any]) -> None:
    """Polls; raises `TimeoutError` after `LIMIT_S`."""
    end = time.monotonic() + LIMIT_S
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError("the cluster has not recovered")
        time.sleep(0.1)


def num_ready(it: Cluster) -> int:
    """Returns the number of replicas that answer."""
    return sum(len(replica_ports(node.pid)) for node in it.nodes if node.poll() is None)


def clients(it: Cluster, number: int = CLIENTS) -> Clients:
    return Clients(it.http, number, TOKENS, (KEY,), keeps=False)


def recovery(it: Cluster, kill: Callable[[], None]) -> dict[str, Any]:
    """Kills something under load: seconds to recover, and how requests ended meanwhile.

    `lost` are requests that were under way at the fault and failed, `refused` failed ones that
    began later. `last_failure_s` is how long after the fault the last of them ended, `answers_s`
    when the first request that began after the fault had its answer, `all_replicas_s` when two
    replicas answered again.
    """
    with clients(it) as load:
        until(lambda: len(load.sent) > 4 * CLIENTS)
        fault = time.monotonic()
        kill()
        until(lambda: num_ready(it) == 2 and it.answers)
        all_replicas_s = time.monotonic() - fault
        until(lambda: answers(load, fault) and quiet_s(load, fault) > SETTLED_S)
    after = [each for each in load.sent if each.ended > fault]
    failed = [each.ended - fault for each in after if each.result != WHOLE]
    found = {
        "answers_s": round(min(answers(load, fault)), 2),
        "last_failure_s": round(max(failed, default=0.0), 2),
        "all_replicas_s": round(all_replicas_s, 2),
        "lost": failures([each for each in after if each.began <= fault]),
        "refused": failures([each for each in after if each.began > fault]),
        "finished": len(after) - len(failed),
    }
    say(found)
    return found


def answers(load: Clients, fault: float) -> list[float]:
    """Returns the seconds from the fault to each answer of a request that began after it."""
    return [each.ended - fault for each in load.sent if each.began > fault and each.result == WHOLE]


def quiet_s(load: Clients, since: float) -> float:
    """Returns the seconds since `since`, or since the last failed request if that was later."""
    failed = (each.ended for each in reversed(load.sent) if each.result != WHOLE)
    return time.monotonic() - max(since, next(failed, 0.0))


def kill_one(it: Cluster, words: str) -> None:
    """Kills a process of the cluster whose command line has `words`."""
    for node in it.nodes:
        for process in all_below(node.pid):
            if words in " ".join(process.cmdline()):
                process.kill()
                process.wait(10)
                return
    raise LookupError(f"no process has {words!r} in its command line")


def lose(it: Cluster, node: Any) -> None:
    """Kills every process of a node at once, as a machine that fails does."""
    gone = [psutil.Process(node.pid), *all_below(node.pid)]
    for process in gone:
        process.kill()
    psutil.wait_procs(gone)
    it.nodes.remove(node)


def measure(it: Cluster) -> dict[str, Any]:
    """One replica becomes two; then a replica, a node and HAProxy are lost.

    Nothing is deployed after a node is lost. Ray notices the loss some seconds later, and Serve
    gives up an update if it starts a replica on the lost node in between.
    """
    it.workers = [it.worker(), it.worker()]
    found = {"one replica to two": growth(it)}
    it.deploy(num_replicas=2, **DEPLOYMENT)
    until(lambda: num_ready(it) == 2 and it.answers)
    found["replica killed"] = recovery(it, lambda: kill_one(it, REPLICA))
    it.worker()  # takes the place of the node that is lost
    found["node lost"] = recovery(it, lambda: lose(it, it.workers[0]))
    found["HAProxy killed"] = recovery(it, lambda: kill_one(it, "haproxy.cfg"))
    return found


def growth(it: Cluster) -> dict[str, Any]:
    """Returns the seconds from the beginning of a load that is too much for one replica until a
    second one answers."""
    it.deploy(autoscaling_config=SCALING, **DEPLOYMENT)
    until(lambda: num_ready(it) == 1 and it.answers)
    began = time.monotonic()
    with clients(it, 12) as load:
        until(lambda: num_ready(it) == 2)
        seconds = time.monotonic() - began
        until(lambda: time.monotonic() > began + seconds + SETTLED_S)
    rates = [
        load.between(begin, end)["tokens_per_s"]
        for begin, end in (
            (began + 1, began + seconds),
            (began + seconds, began + seconds + SETTLED_S),
        )
    ]
    found = {
        "seconds": round(seconds, 2),
        "upscale_delay_s": SCALING["upscale_delay_s"],
        "failed": failures(load.sent),
        "finished": len(load.sent),
        "tokens_per_s": dict(zip(("before", "after"), rates, strict=True)),
    }
    say(found)
    return found
