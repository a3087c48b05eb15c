"""Every package says which modules it has, for readers who see it for the first time."""

import ast
import re
from pathlib import Path

import pytest

PACKAGES = sorted(path.parent for path in Path("serve_app").rglob("*/__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=map(str, PACKAGES))
def test_a_package_names_its_modules(package: Path) -> None:
    """The docstring of a package has the name of each of its modules and packages."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    modules = [file.stem for file in package.glob("*.py") if file.stem != "__init__"]
    packages = [file.parent.name for file in package.glob("*/__init__.py")]
    words = set(re.findall(r"\w+", docstring))
    assert [name for name in modules + packages if name not in words] == []
