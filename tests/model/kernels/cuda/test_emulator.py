"""The tools of the other tests in this folder."""

import os
import time
from pathlib import Path

from tests.model.kernels.cuda.emulator import UNUSED_DAYS, mark_used


def test_compiled_kernels_that_no_test_uses_are_deleted(tmp_path: Path) -> None:
    """A week after their last use; the cache would grow with every change of a source."""
    used, recent, old = (tmp_path / name for name in ("used", "recent", "old"))
    now = time.time()
    for path, days in ((used, UNUSED_DAYS + 1), (recent, UNUSED_DAYS - 1), (old, UNUSED_DAYS + 1)):
        path.touch()
        os.utime(path, (now, now - days * 24 * 3600))
    mark_used(used)
    mark_used(used)
    assert {path.name for path in tmp_path.iterdir()} == {"used", "recent"}
