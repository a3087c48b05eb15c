"""Gives the emulator's tests a running platform."""

from collections.abc import Iterator

import pytest

from emulator.platform import Platform


@pytest.fixture
def platform() -> Iterator[Platform]:
    """Yields a platform that answers an empty poll after 0.1 s."""
    with Platform() as platform:
        platform.queue.hold_s = 0.1
        yield platform
