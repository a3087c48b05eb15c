"""Importing us costs nothing: heavy libraries come when they are used, and only in their rooms."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "ray")
ROOMS_WITH_TORCH = ("serve_app.engine.", "serve_app.model.")

# Imports the modules one after another; prints which of them brought in which library first.
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
    """Every module of ours outside engine/ and model/, and those two packages themselves."""
    paths = [*Path("serve_app").rglob("*.py"), Path("runpod_entry.py")]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(name for name in names if not name.startswith(ROOMS_WITH_TORCH))


def brought_in(names: list[str], libraries: tuple[str, ...]) -> dict[str, str]:
    """The libraries that importing `names` in a new process loads, with the module to blame."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(libraries), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_no_module_loads_a_heavy_library() -> None:
    """None outside engine/ and model/ loads torch, ray or anything as large."""
    assert len(modules()) > 20
    assert brought_in(modules(), HEAVY) == {}


def test_libraries_stay_in_their_rooms() -> None:
    """Starlette comes with the ingress only, runpod with the worker and the entry only."""
    doors = ("serve_app.api.ingress", "serve_app.worker", "runpod_entry")
    others = [name for name in modules() if not name.startswith(doors)]
    assert brought_in(others, ("starlette", "runpod")) == {}
