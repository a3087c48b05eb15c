"""A short soak: jobs of every kind on a platform with faults."""

import pytest

from benchmarks.soak import KINDS, soak

pytestmark = pytest.mark.faults


def test_every_job_is_accounted_for() -> None:
    """All jobs end as their kind should, with one result, and no KV block stays in use."""
    figures = soak(100, seed=2)
    assert figures["wrong"] == []
    assert figures["kv_blocks_used"] == 0
    assert {name.split()[0] for name in figures["ended"]} == set(KINDS)
    assert sum(figures["ended"].values()) == 100
