"""Importing the package loads no heavy library, and light ones only where they are used."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "ray")
PACKAGES_WITH_TORCH = ("serve_app.engine.", "serve_app.model.")

# Imports the modules one after another; prints for each library the first module that loads it.
SCRIPT = """
import importlib, json, sys
found = {}
for module in sys.argv[2:]:
    importlib.import_module(module)
    for library in json.loads(sys.argv[1]):
        if library in sys.modules:
            found.setdefault(library, module)
print(json.dumps(found))
"""


def modules() -> list[str]:
    """Returns every module outside engine/ and model/, and the `__init__` of those two packages."""
    paths = [*Path("serve_app").rglob("*.py"), Path("runpod_entry.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if not name.startswith(PACKAGES_WITH_TORCH))


def loaded(names: list[str], libraries: tuple[str, ...]) -> dict[str, str]:
    """Returns the libraries that importing `names` in a new process loads, each with its first
    module."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(libraries), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_no_module_loads_a_heavy_library() -> None:
    """No module outside engine/ and model/ loads torch, transformers or ray when it is imported."""
    assert len(modules()) > 20
    assert loaded(modules(), HEAVY) == {}


def test_a_library_is_loaded_where_it_is_used() -> None:
    """Only the HTTP ingress loads starlette; only the worker and the entry load runpod."""
    names = ("ingress", "request_body", "request_id", "event_stream", "cors", "guard")
    http = tuple(f"serve_app.api.{name}" for name in (*names, "early_answer", "error_response"))
    users = (*http, "serve_app.worker", "runpod_entry")
    others = [name for name in modules() if not name.startswith(users)]
    assert loaded(others, ("starlette", "runpod")) == {}
