"""Waits until every job is accounted for after a fault, with nothing in use and no process left."""

from pathlib import Path

from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import ENTRY, Worker
from tests.worker.conftest import Client, until


def settled(platform: Platform, worker: Worker) -> None:
    """Waits until every job is accounted for and nothing is in use; fails if that never happens.

    Each job has exactly one acknowledged result; a cancelled one has none, or one that was under
    way. No call to the model is open and no KV block in use. If the worker has ended, none of its
    processes runs.
    """
    until(lambda: all(map(_is_accounted_for, platform.queue.jobs.values())))
    for job in platform.queue.jobs.values():
        assert job.num_results in ((0, 1) if job.status == "CANCELLED" else (1,)), job
        assert "Traceback" not in str(job.error)
    if worker.process.poll() is not None:
        until(lambda: not left_behind(worker.home))
    elif worker.script == ENTRY:
        until(lambda: _is_engine_idle(platform))
    else:
        until(lambda: worker.log.count("\ncall ") == worker.log.count("\nclosed "))


def left_behind(home: Path) -> list[int]:
    """Ids of living processes with this home folder, also those with another parent by now."""
    mark = f"HOME={home}\0".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has just ended, or belongs to another user
    return found


def _is_accounted_for(job: Job) -> bool:
    return job.is_over and (job.status == "CANCELLED" or job.num_results > 0)


def _is_engine_idle(platform: Platform) -> bool:
    health = Client(platform).ended({"endpoint": "/health"}).output
    if "engine" not in health:
        return True  # no model is loaded
    engine = health["engine"]
    return (engine["running"], engine["waiting"], engine["kv_blocks_used"]) == (0, 0, 0)
