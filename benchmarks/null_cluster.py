"""`mixtral-serve` with the null model of `null_server` in place of the model of its configuration.

python -m benchmarks.null_cluster run CONFIG
"""

import sys
from functools import partial
from typing import Any

from benchmarks import null_server
from serve_app import app
from serve_app.loading.load import Loaded


def load(*args: Any, plan: object = None) -> Loaded:
    """Replaces `serve_app.loading.load.load`; there is nothing that the plan says about it."""
    return null_server.load(*args)


def main() -> None:
    """Runs the command."""
    from benchmarks.null_cluster import load  # not of `__main__`, which a replica lacks
    from serve_app.cli.commands import main as command

    app.application = partial(app.application, load=load)
    sys.exit(command())


if __name__ == "__main__":
    main()
