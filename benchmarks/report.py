"""What a run has found so far: told and written as it is known, whatever comes after.

A part that fails is kept with its reason, and the run goes on. Knows nothing of what is measured.
"""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import save

say = partial(print, flush=True)
"""So that a run that is ended has told what it knew."""


class Report:
    """A document, and the file, if any, that has it at every moment."""

    def __init__(self, document: dict[str, Any], file: Path | None) -> None:
        """Raises `OSError` where the file cannot be written, before anything is measured."""
        self.document = document
        self.document |= {"seconds": {}, "failures": {}}
        self._file = file
        self.keep()

    def keep(self) -> None:
        """Writes what is known."""
        if self._file is not None:
            save(self.document, self._file)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One of the run's parts, whose time is told; else as `tried`."""
        began = time.perf_counter()
        with self.tried(name):
            try:
                yield
            finally:
                self.document["seconds"][name] = round(time.perf_counter() - began, 1)

    @contextmanager
    def tried(self, name: str) -> Iterator[None]:
        """What is raised in here stands under `failures`, and the run goes on."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {str(error)[:500]}"
            self.document["failures"][name] = said
            say(f"FAILED: {name}: {said}\n{traceback.format_exc()}")
        finally:
            self.keep()
