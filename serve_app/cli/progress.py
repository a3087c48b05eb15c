"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[int, int, str], None]
"""A function `show(num_done, num_all, name)`; `name` is the last finished item, or ""."""


@contextmanager
def files(title: str) -> Iterator[Show]:
    """Shows the progress of a list of files, with a line for each."""
    with _shown(title, "files", "", lambda done, total: True) as show:
        yield show


@contextmanager
def items(title: str, noun: str) -> Iterator[Show]:
    """Shows the progress of a long list, with a line for each twentieth of it. `noun` names the
    items."""
    last_twentieth = -1

    def is_new_twentieth(done: int, total: int) -> bool:
        nonlocal last_twentieth
        before, last_twentieth = last_twentieth, 20 * done // max(total, 1)
        return last_twentieth != before

    with _shown(title, noun, f"{title}: ", is_new_twentieth) as show:
        yield show


@contextmanager
def _shown(
    title: str, noun: str, prefix: str, has_line: Callable[[int, int], bool]
) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    def print_line(done: int, total: int, name: str) -> None:
        if has_line(done, total):
            print(f"{prefix}{done} of {total} {noun}{f': {name}' if name else ''}", flush=True)

    console = Console()
    if not console.is_terminal:
        yield print_line
        return
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        noun,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)
