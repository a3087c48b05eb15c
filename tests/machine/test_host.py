"""Memory and cores as the container sees them, under both versions of cgroups."""

import os
from pathlib import Path

import pytest

from serve_app.machine import host

GB = 10**9


def container(folder: Path, version: int, limit: str, used: int, cached: int) -> Path:
    """Returns a cgroup folder whose processes hold `used` bytes, `cached` of them page cache."""
    if version == 2:
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached - 9}\nactive_file 9\n")
        (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
        return folder
    inside = folder / "memory"
    inside.mkdir()
    (inside / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (inside / "memory.usage_in_bytes").write_text(f"{used}\n")
    stat = f"total_inactive_file {cached - 9}\ntotal_active_file 9\n"
    (inside / "memory.stat").write_text(stat)
    (inside / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    return folder


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(tmp_path: Path, version: int) -> None:
    """The page cache counts as free memory, other memory of the container does not; kills count."""
    cgroup = container(tmp_path, version, str(GB), 900_000_000, 600_000_000)
    assert host.limit_bytes(cgroup) == GB
    assert host.free_bytes(cgroup) == 700_000_000
    assert host.num_oom_kills(cgroup) == 2


@pytest.mark.parametrize(("version", "limit"), [(1, str(2**63 - 4096)), (2, "max")])
def test_no_limit_is_the_machines_memory(tmp_path: Path, version: int, limit: str) -> None:
    """A container without a limit, or without cgroup files, has the machine's memory."""
    cgroup = container(tmp_path, version, limit, GB, 10)
    assert host.limit_bytes(cgroup) is None
    assert host.free_bytes(cgroup) > 50_000_000
    assert host.limit_bytes(tmp_path / "absent") is None
    assert host.num_oom_kills(tmp_path / "absent") == 0


@pytest.mark.parametrize(
    ("version", "quota", "expected"),
    [
        (2, "max", 4),
        (2, "250000", 2),
        (2, "50000", 1),
        (2, "900000", 4),
        (1, "-1", 4),
        (1, "200000", 2),
    ],
)
def test_cores_are_those_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, quota: str, expected: int
) -> None:
    """A limit below the cores of the affinity counts, in whole cores and at least one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert host.num_cores(tmp_path) == 4
    if version == 2:
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    else:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert host.num_cores(tmp_path) == expected
