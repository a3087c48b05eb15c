"""Finds and kills Ray's processes below this one.

Ray 2.60 runs on one machine as a tree of processes:

    this process, Ray's "driver"
      gcs_server          the cluster's state: nodes, actors
      raylet              manages this machine: starts workers and assigns resources
        ray::...          workers: Serve's controller, its proxies, and the replica with the model
          haproxy         receives the server's requests
        agents            runtime environments
      log_monitor

Observed effects if one of them is killed:

    raylet      The replica, now an orphan, answers for half a minute, until the GCS notices. This
                process adopts orphans (`processes.adopt_orphans`), so that they stay below it and
                `kill` finds them.
    GCS         Running calls hang, the driver uses a whole core, and after 60 s Ray ends the
                driver, which is this process. So the caller of `lost` ends Ray earlier.
    driver      GCS and raylet end with it, and the replica 3 s later. Ray's agents would wait a
                minute for the GCS; `reaper.py` ends all of them at once.

tests/faults/test_worker.py and tests/faults/test_http_endpoint.py kill each of them.
"""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.machine import processes
from serve_app.node import ray_worker

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

GCS = "/gcs_server "
"""Part of the command line of the GCS."""
HAPROXY = "/haproxy.cfg"
"""Part of the command line of HAProxy, and of the program that becomes it."""
VITAL = {GCS: "Ray's GCS", "/raylet ": "Ray's raylet"}
"""Parts of the command lines of processes that Ray cannot do without, and their names."""


def below() -> "list[psutil.Process]":
    """Returns all of Ray's processes below this one.

    Workers have a title that begins with `ray::`. The command line of the other processes contains
    a path: our worker program for a worker that has not registered yet, the configuration for
    HAProxy, and Ray's folder for the rest.
    """
    import ray

    folder = Path(ray.__file__).parent
    programs = f"{folder}{os.sep}", HAPROXY, ray_worker.__file__
    commands = ((process, processes.command(process)) for process in processes.descendants())
    return [
        process
        for process, line in commands
        if line.startswith("ray::") or any(program in line for program in programs)
    ]


def vital() -> "dict[str, psutil.Process]":
    """Returns the living processes that Ray cannot do without, by their names in messages."""
    commands = [(process, processes.command(process)) for process in below()]
    return {
        name: process
        for words, name in VITAL.items()
        for process, line in commands
        if words in line
    }


def lost() -> str | None:
    """Returns the name of a dead process that Ray cannot do without; None if all are alive."""
    import ray

    if not ray.is_initialized():
        return None
    alive = vital()
    return next((name for name in VITAL.values() if name not in alive), None)


def kill() -> None:
    """Kills all of Ray's processes. Logs an error with the names of those that did not end."""
    if remaining := processes.kill(below):
        names = ", ".join(processes.command(process).split(" ")[0] for process in remaining)
        log.error("These processes of Ray could not be killed: %s.", names)


def kill_all_but_gcs() -> None:
    """Kills all of Ray's processes except the GCS, which `ray.shutdown()` calls."""
    processes.kill(
        lambda: [process for process in below() if GCS not in processes.command(process)]
    )
