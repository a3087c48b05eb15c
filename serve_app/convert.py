"""`python -m serve_app.convert SRC DST`: a Mixtral checkpoint in our own 4-bit form.

SRC is a folder or a Hugging Face repository, in floats or in bitsandbytes' 4 bits; the latter is
kept bit for bit. DST starts in a quarter of the time. A conversion that was stopped goes on
where it was when it is started again.
"""

import argparse
import sys
from pathlib import Path
from typing import IO

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.convert import convert
from serve_app.model.quantization import Quantization


class Bar:
    """Says how far a conversion is: a bar on a terminal, elsewhere a line per file."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def __call__(self, done: int, total: int, name: str) -> None:
        if self.stream.isatty():
            full = 40 * done // total
            end = "\n" if done == total else ""
            self.stream.write(f"\r[{'#' * full:<40}] {done} of {total} files{end}")
        else:
            self.stream.write(f"{done} of {total} files{f': {name}' if name else ''}\n")
        self.stream.flush()


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where DST is complete, else one sentence on stderr and 1."""
    from serve_app.start_plan.hub import find_checkpoint

    parser = argparse.ArgumentParser(
        prog="python -m serve_app.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a folder, or a repository as owner/name")
    parser.add_argument("destination", metavar="DST", type=Path, help="a folder")
    parser.add_argument("--quantization", choices=("nf4", "fp4"), help="of floats; default nf4")
    parser.add_argument(
        "--absmax",
        choices=("nested", "bfloat16", "float32"),
        help="of floats: 24.5, 25.2 or 26.6 GB for Mixtral 8x7B; default bfloat16",
    )
    chosen = parser.parse_args(arguments)
    asked = None
    if chosen.quantization or chosen.absmax:
        asked = Quantization(chosen.quantization or "nf4", chosen.absmax or "bfloat16")
    try:
        source = find_checkpoint(chosen.source)
        convert(source, chosen.destination, asked, Bar(sys.stdout))
    except ModelLoadFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    print(f"{chosen.destination}: is complete.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
