"""`python -m serve_app.convert SRC DST` is `mixtral-serve convert SRC DST`."""

import sys

from serve_app.cli import commands


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, by default those of this process. Returns the exit
    code."""
    return commands.main(["convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
