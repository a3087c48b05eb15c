"""The program of Ray's worker processes on this machine: some imports, then Ray's own program.

By default the raylet starts Ray's `default_worker.py` for each worker process. It registers with
Ray at once, waits, becomes the next actor that needs a process, and only then imports the actor's
modules: for a replica torch and our model, which takes several seconds. `head.py` makes the raylet
start this program instead:

    the first process    imports a replica's libraries, then registers
    the others           register at once and become Serve's controller and proxies

So the process for the replica has already imported its libraries. If Ray uses another process for
the replica, that one imports them itself, as by default. The processes use a file in the folder of
Ray's session to decide which one is the first.

No GPU is used here: Ray sets the replica's CUDA_VISIBLE_DEVICES later, before CUDA starts.
tests/node/test_ray_worker.py checks this.
"""

import importlib
import runpy
import sys
from pathlib import Path

MODULES = (
    "ray.serve._private.replica",
    "torch",
    "tokenizers",
    "jinja2.sandbox",
    "serve_app.api.ingress",
    "serve_app.engine.model_runner",
    "serve_app.loading.warm_up",
    "serve_app.model.checkpoint.loader",
)
WORKER = "ray._private.workers.default_worker"
CLAIM = "replica_imports"
"""File in the folder of Ray's session. The worker that creates it does the imports."""


def is_first(session: Path) -> bool:
    """Returns True for the first process that calls this, in the session with this folder."""
    try:
        (session / CLAIM).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def session_folder(arguments: list[str]) -> Path:
    """Returns the folder of Ray's session, from the command line of its worker."""
    flags = dict(
        argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument
    )
    return Path(flags["temp-dir"]) / flags["session-name"]


def main() -> None:
    """Runs Ray's worker in this process, with the command line that Ray gave it."""
    # Python puts this file's folder first, whose `http.py` would hide the standard library's. The
    # folder of the package is needed where it is not installed.
    sys.path[0] = str(Path(__file__).parents[2])
    if is_first(session_folder(sys.argv[1:])):
        for module in MODULES:
            importlib.import_module(module)
    importlib.import_module("serve_app.node.session_folder").keep_private()
    runpy.run_module(WORKER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
