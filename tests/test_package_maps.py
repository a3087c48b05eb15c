"""Every package says which modules it has, for readers who see it for the first time."""

import ast
import re
from pathlib import Path

import pytest

PACKAGES = sorted(path.parent for path in Path("serve_app").rglob("*/__init__.py"))
PACKAGES.append(Path("tests"))


@pytest.mark.parametrize("package", PACKAGES, ids=map(str, PACKAGES))
def test_a_package_names_its_modules(package: Path) -> None:
    """The docstring of a package names each of its packages, and each module that is no test."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    names = [file.stem for file in package.glob("*.py")]
    modules = [name for name in names if not name.startswith(("__init__", "test_"))]
    packages = [file.parent.name for file in package.glob("*/__init__.py")]
    words = set(re.findall(r"\w+", docstring))
    assert [name for name in modules + packages if name not in words] == []
