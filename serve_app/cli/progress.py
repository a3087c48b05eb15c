"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

ShowFiles = Callable[[int, int, str], None]
"""Called with the number of finished files, the number of all, and the name of the last one."""


@contextmanager
def files(title: str) -> Iterator[ShowFiles]:
    """Shows progress that is counted in files while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console()
    if not console.is_terminal:
        yield _print_line
        return
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        "files",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


def _print_line(done: int, total: int, name: str) -> None:
    print(f"{done} of {total} files{f': {name}' if name else ''}", flush=True)
