"""`mixtral-serve keys`: adds, lists and removes the API keys of a file."""

import time
from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Option("--file", "-f", help="The file that `api.keys_file` names.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The key's name, for log and metrics.")]
DEFAULT = Path("api-keys.json")
WIDTH = 160
"""Number of characters in a line of the list that goes to a file or another program."""

app = typer.Typer(
    help="API keys in a file, each with a name and limits. A running server follows the file.",
    no_args_is_help=True,
)


@app.command()
def add(
    name: Name,
    file: File = DEFAULT,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    tokens_per_minute: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of prompts and answers.", show_default=False),
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Concurrent requests.", show_default=False)
    ] = None,
    min_priority: Annotated[
        int,
        typer.Option(min=-1000, max=1000, help="Minimum `priority` of its requests."),
    ] = 0,
) -> None:
    """Create a key, write its hash to the file, and print the key, which is not stored."""
    from serve_app.config.key_file import KeyLimits, add_key

    limits = KeyLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        min_priority=min_priority,
    )
    print(add_key(file, name, limits))


@app.command(name="list")
def list_keys(file: File = DEFAULT) -> None:
    """Show the names and limits of the keys."""
    from rich.console import Console
    from rich.table import Column, Table

    from serve_app.config.key_file import read_keys

    # Nothing is shortened: `remove` needs the whole name, and a limit without its end is wrong.
    titles = ("name", "created", "requests/min", "tokens/min", "concurrent", "min priority")
    table = Table(*(Column(title, overflow="fold") for title in titles))
    for key in read_keys(file):
        limits = key.requests_per_minute, key.tokens_per_minute, key.max_concurrent
        created = time.strftime("%Y-%m-%d", time.gmtime(key.created))
        cells = ["-" if limit is None else f"{limit:,}" for limit in limits]
        table.add_row(key.name, created, *cells, str(key.min_priority))
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table)


@app.command()
def remove(name: Name, file: File = DEFAULT) -> None:
    """Remove a key; a running server refuses it within seconds."""
    from serve_app.config.key_file import remove_key

    remove_key(file, name)
    print(f"{file}: {name} is removed.")
