"""The lock, requirements*.txt, agrees with pyproject.toml and with what is installed."""

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCKS = ("requirements.txt", "requirements-dev.txt")
LEFT_TO_TORCH = ("cuda-", "nvidia-", "triton")
"""CUDA's libraries and triton: torch's own metadata pins them, and builds for a CPU have none."""


def locked(*paths: str) -> list[Requirement]:
    """Returns the requirements in the files, without those for another platform or Python."""
    lines = [line for path in paths for line in Path(path).read_text().splitlines()]
    found = [Requirement(line.partition("#")[0]) for line in lines if line.partition("#")[0]]
    return [each for each in found if each.marker is None or each.marker.evaluate()]


def pins(paths: tuple[str, ...]) -> dict[str, str]:
    """Returns the version of every locked package; fails if a package is locked twice."""
    found = [(canonicalize_name(each.name), str(each.specifier)) for each in locked(*paths)]
    assert len(dict(found)) == len(found)
    return dict(found)


def project() -> tuple[list[Requirement], list[Requirement]]:
    """Returns the dependencies in pyproject.toml: those of the package and those of the `dev`
    extra."""
    table = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    runtime, dev = table["dependencies"], table["optional-dependencies"]["dev"]
    return list(map(Requirement, runtime)), list(map(Requirement, dev))


def needed(requirements: Iterable[Requirement]) -> set[str]:
    """Returns the names of all packages that `requirements` need, by the installed packages'
    metadata."""
    found: set[tuple[str, str]] = set()
    waiting = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {seen for at, seen in found if at == name}:
            found.add((name, extra))
            lines = map(Requirement, distribution(name).requires or ())
            waiting += [
                each for each in lines if not each.marker or each.marker.evaluate({"extra": extra})
            ]
    return {name for name, _ in found}


@pytest.mark.parametrize(("paths", "group"), [(LOCKS[:1], 0), (LOCKS, 1)])
def test_the_lock_has_the_pins(paths: tuple[str, ...], group: int) -> None:
    """The lock has every dependency of pyproject.toml in the same version; see `make lock`."""
    found = pins(paths)
    for requirement in project()[group]:
        assert found[canonicalize_name(requirement.name)] == str(requirement.specifier)


def test_the_lock_is_complete_and_has_nothing_else() -> None:
    """The lock has what the dependencies need, no more, save what torch pins for a GPU machine."""
    runtime, dev = project()
    for paths, requirements in ((LOCKS[:1], runtime), (LOCKS, [*runtime, *dev])):
        wanted = {name for name in needed(requirements) if not name.startswith(LEFT_TO_TORCH)}
        found = {name for name in pins(paths) if not name.startswith(LEFT_TO_TORCH)}
        assert found == wanted


def test_the_locked_versions_are_installed() -> None:
    """The tests run with exactly the locked packages; torch may be a build for any device."""
    for name, specifier in pins(LOCKS).items():
        try:
            installed = Version(version(name)).public
        except PackageNotFoundError:
            installed = "none"
        assert f"=={installed}" == specifier, name


def test_the_lock_leaves_cudas_libraries_to_torch() -> None:
    """No package of torch's CUDA build is locked: a machine without a GPU would install it."""
    named = {canonicalize_name(each.name) for group in project() for each in group}
    for path in LOCKS:
        assert not [
            name for name in pins((path,)) if name.startswith(LEFT_TO_TORCH) and name not in named
        ]


def test_the_lock_names_no_address() -> None:
    """Versions only: no index, no file and no option that a machine may not have."""
    for path in LOCKS:
        text = Path(path).read_text()
        assert "://" not in text
        assert not [line for line in text.splitlines() if line.startswith("-")]
