"""The image, built once for all tests."""

from pathlib import Path

import pytest

from tools.image import buildah
from tools.image.buildah import Build, build, make_base

IMAGE = "localhost/mixtral-serve-test"
REASON = buildah.missing()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests in this folder; skips them where no image can be built, with the reason."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.image)
            item.add_marker(pytest.mark.timeout(1500))  # the first one builds everything
            if REASON:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="session")
def built() -> Build:
    """The project's image."""
    make_base()
    return build(IMAGE)


@pytest.fixture(scope="session")
def image(built: Build) -> str:
    return built.image
