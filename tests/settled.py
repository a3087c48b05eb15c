"""What must hold after any fault: every job accounted for, nothing in use, no process left."""

from pathlib import Path

from emulator.platform import Platform
from emulator.queue import Job
from emulator.worker import ENTRY, Worker
from tests.worker.conftest import Client, until


def settled(platform: Platform, worker: Worker) -> None:
    """Waits until all that a fault touched is in order again.

    Each job that the worker took has had exactly one terminal post acknowledged (a cancelled one
    none, or one that was on its way), no call to the model is open and no KV block in use; or,
    where the worker has ended, nothing of it runs any more.
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
    """Living processes of the worker whose home this is, whoever is their parent by now."""
    mark = f"HOME={home}\0".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue  # it has just ended, or belongs to somebody else
    return found


def _is_accounted_for(job: Job) -> bool:
    return job.is_over and (job.status == "CANCELLED" or job.num_results > 0)


def _is_engine_idle(platform: Platform) -> bool:
    health = Client(platform).ended({"endpoint": "/health"}).output[0]
    if "engine" not in health:
        return True  # there is no model that could hold any
    engine = health["engine"]
    return (engine["running"], engine["waiting"], engine["kv_blocks_used"]) == (0, 0, 0)
