"""A step under way: started, its tokens not yet known here.

A runner that looks ahead starts a step whose tokens come from the one before while they are still
on the device; the host reads them, tells them and schedules in the meantime. `PENDING` stands in a
sequence for the token that it cannot know yet. Knows no scheduling.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from serve_app.engine.runner import Runner
from serve_app.engine.sequence import PENDING, Chunk, Samples


class Outcome(Protocol):
    """What a started step will have yielded."""

    def samples(self) -> Samples:
        """Waits for it; raises what the step failed with."""
        ...


@runtime_checkable
class AheadRunner(Runner, Protocol):
    """A runner that can start a step before the last one's tokens are known to the host."""

    @property
    def looks_ahead(self) -> bool: ...

    def launch(self, chunks: list[Chunk]) -> Outcome:
        """Starts the step. A token that is `PENDING` is the one that the last launch yields for
        the sequence; steps run in the order in which they were launched."""
        ...


def looking_ahead(runner: Runner) -> AheadRunner | None:
    """`runner`, where it can start steps ahead. Asking takes longer than scheduling: ask once."""
    return runner if isinstance(runner, AheadRunner) and runner.looks_ahead else None


class _Known:
    """The outcome of a step that is over."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def samples(self) -> Samples:
        return self._samples


@dataclass
class Flight:
    """A started step."""

    chunks: list[Chunk]
    outcome: Outcome

    @classmethod
    def start(cls, runner: Runner, ahead: AheadRunner | None, chunks: list[Chunk]) -> "Flight":
        """Starts a step, or makes it where there is no runner that looks ahead; raises if it fails.

        From here on its chunks count as computed, and have a token that is `PENDING`.
        """
        outcome = _Known(runner.step(chunks)) if ahead is None else ahead.launch(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed = chunk.end
            if chunk.samples:
                chunk.sequence.token_ids.append(PENDING)
        return cls(chunks, outcome)
