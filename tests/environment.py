"""The environment of a process that must see nothing of this one's."""

import os
from pathlib import Path

KEPT = ("PATH", "COVERAGE_PROCESS_CONFIG")
"""Variables that it inherits: where programs are, and by which coverage counts its lines too."""


def bare(home: Path) -> dict[str, str]:
    """The variables in `KEPT`, and `home` as its home folder."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "HOME": str(home)}
