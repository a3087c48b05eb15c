"""A benchmark's options and its result: one JSON document, printed and kept in a file."""

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

say = partial(print, flush=True)
"""Prints without buffering, so that an interrupted run has shown its results."""


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the option `--save`, which every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, help="also write the JSON document to this file")
    return parser


def publish(benchmark: str, figures: dict[str, Any], file: Path | None) -> None:
    """Prints the document of a run as one line of JSON, the last line that a run prints.

    The document has the benchmark's name, date, machine and versions, then `figures`. `file`, if
    given, gets it with one field per line, so that two runs can be compared.
    """
    document = {"benchmark": benchmark, **describe(), **figures}
    if file is not None:
        save(document, file)
    print(json.dumps(document))


def save(document: dict[str, Any], file: Path) -> None:
    """Replaces `file` in one step, so that it is never half written."""
    whole = file.with_name(file.name + ".part")
    whole.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    whole.replace(file)


class Report:
    """The results of a run, which continues if a part fails and saves them after every part."""

    def __init__(self, benchmark: str, figures: dict[str, Any], file: Path | None) -> None:
        """Raises `OSError` if `file` cannot be written, before anything is measured."""
        self.figures: dict[str, Any] = {**figures, "seconds": {}, "failures": {}}
        self._benchmark = benchmark
        self._file = file
        self._save()

    def _save(self) -> None:
        if self._file is not None:
            save({"benchmark": self._benchmark, **describe(), **self.figures}, self._file)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times one part of the run; a failure is handled as by `attempt`."""
        began = time.perf_counter()
        with self.attempt(name):
            try:
                yield
            finally:
                self.figures["seconds"][name] = round(time.perf_counter() - began, 1)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Records an exception under `failures` instead of raising it, and saves the file."""
        try:
            yield
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            self.figures["failures"][name] = reason
            say(f"FAILED: {name}: {reason}\n{traceback.format_exc()}")
        finally:
            self._save()

    def publish(self) -> None:
        """Prints the document as `publish` does."""
        publish(self._benchmark, self.figures, self._file)
