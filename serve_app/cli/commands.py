"""The subcommands of `mixtral-serve`.

Each imports what it needs when it is called. The exit codes of all of them:

    0      done; for `run`, also after SIGTERM or Ctrl-C
    1      an error, with one sentence on standard error: a `ConfigError`, a `ServeError`, a file
           that cannot be read or written
    2      wrong arguments
    130    Ctrl-C

Where the log is JSON, the sentence is a line of it, and so is a bug.
"""

import errno
import io
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from serve_app.cli import keys

log = logging.getLogger(__name__)

INTERRUPTED = 130
"""128 and the number of SIGINT, as shells report it."""
CONFIG_HELP = "local, runpod, tiny, tiny-nf4, or the path of a YAML file that `serve run` takes."

app = typer.Typer(
    help="Mixtral 8x7B in 4 bits from one Ray Serve deployment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(keys.app, name="keys")
Config = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG_HELP, show_default=False)]


@app.command()
def run(config: Config) -> None:
    """Serve CONFIG over HTTP until SIGTERM or Ctrl-C. Checks it first."""
    from serve_app.cli import serving

    raise typer.Exit(serving.run(config))


@app.command()
def check(
    config: Config,
    load: Annotated[
        bool, typer.Option("--load", help="Also load the model, try it, and write a report.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The report that --load writes.")] = Path(
        "mixtral-check.json"
    ),
) -> None:
    """Check CONFIG and print the memory and disk space that it needs. Starts no server."""
    from serve_app.cold_start.check import check
    from serve_app.config import named
    from serve_app.config.serve_config import http_options, port_setting
    from serve_app.machine.ports import require_free

    path = named.find(config)
    checked = check(path)
    for line in checked.lines:
        print(line)
    if load:
        from serve_app.api import trial

        trial.run(checked.settings, checked.plan, out)
    options = http_options(path)
    require_free(port_setting(path), options["port"], options["host"])


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder, or a repository as owner/name.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder.")],
    quantization: Annotated[
        Literal["nf4", "fp4"] | None,
        typer.Option(help="4-bit type for floats. Default: nf4.", show_default=False),
    ] = None,
    absmax: Annotated[
        Literal["nested", "bfloat16", "float32"] | None,
        typer.Option(
            help="Form of the scales; the checkpoint of Mixtral 8x7B has 25.9, 25.2 or 28.1 GB "
            "with them. Default: bfloat16.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert the checkpoint SRC to our own 4-bit form, which loads in a quarter of the time.

    Floats in SRC are quantized; bitsandbytes' 4-bit weights are copied bit for bit. If SRC is in
    our own form, DST gets bitsandbytes' form, with the bits of the original checkpoint. To continue
    a conversion that was stopped, run the same command again.
    """
    from serve_app.cli import progress
    from serve_app.model.checkpoint.convert import convert
    from serve_app.model.quantization import Quantization
    from serve_app.start_plan.hub import find_checkpoint

    target = None
    if quantization or absmax:
        target = Quantization(quantization or "nf4", absmax or "bfloat16")
    try:
        folder = find_checkpoint(source)
        with progress.files("Converting") as show:
            convert(folder, destination, target, show)
    except KeyboardInterrupt:
        raise _stopped() from None
    print(f"{destination} is complete.")


@app.command()
def kernels(
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder.")],
    capabilities: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CAPABILITY]...", help="Compute capabilities such as 9.0. Default: all."
        ),
    ] = None,
) -> None:
    """Compile the CUDA kernels for Mixtral 8x7B into the folder DST. Needs no GPU.

    A server looks for compiled kernels in `~/.cache/mixtral-serve/kernels` and in the folder
    `kernels` of `model.cache_dir`. If there are none, it compiles them at its first start.
    """
    from serve_app.cli import compile_kernels

    compile_kernels.run(destination, capabilities or [])


@app.command()
def batch(
    config: Config,
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="A file with one request a line (JSONL).")
    ],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The file of the results.")],
) -> None:
    """Answer the requests in IN with CONFIG's model, in OpenAI's batch format. Needs no server.

    Each result, also an error, is appended to OUT as soon as it is ready. To continue a batch that
    was stopped, run the same command again: it answers the requests without a result in OUT. The
    exit code is 1 if OUT contains an error.
    """
    from serve_app.cli import batch

    try:
        code = batch.run(config, source, destination)
    except KeyboardInterrupt:
        raise _stopped() from None
    raise typer.Exit(code)


@app.command()
def quality(
    config: Config,
    texts: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[TEXT ...]", help="Text files. Default: a text of this package."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to FILE.")
    ] = None,
) -> None:
    """Measure the loss of quality by 4 bits: compare CONFIG's model with floats in transformers.

    Prints perplexity, divergence of next-token distributions, and how often the best token is the
    same, also for transformers with bitsandbytes. Float weights that do not fit on the GPU are kept
    in main memory and in files, which is slow; TMPDIR names the folder of the files.
    """
    from serve_app.cli import quality

    quality.run(config, texts or [], out)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="URL of the server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Default: the first of /v1/models.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A system message.", show_default=False)
    ] = None,
) -> None:
    """Chat with a running server. The API key is read from API_KEYS or OPENAI_API_KEY."""
    from serve_app.cli.chat import Chat
    from serve_app.config.settings import ClientSettings

    key = ClientSettings().api_key
    raise typer.Exit(Chat(url, key, model, system).run())


def _stopped() -> typer.Exit:
    """Prints how to continue after Ctrl-C. Returns the exception that ends the command."""
    print("Stopped; run the same command again to continue.", file=sys.stderr)
    return typer.Exit(INTERRUPTED)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with `arguments`, by default those of this process. Returns the exit
    code."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # the terminal may lack characters of an answer
    try:
        app(arguments, prog_name="mixtral-serve")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        from serve_app.config.log_format import is_json

        message = message_of(error)
        if is_json():
            log.error("%s", message or error, exc_info=message is None)
        elif message is not None:
            print(message, file=sys.stderr)
        else:
            raise
        return 1
    return 0


def message_of(error: Exception) -> str | None:
    """Returns the one sentence for `error`; None if it is a bug, whose stack trace is needed."""
    from serve_app.config.serve_config import ConfigError
    from serve_app.errors import ServeError

    match error:
        case ConfigError() | ServeError():
            return str(error)
        case OSError(filename=str(name), strerror=str(reason)):
            return f"{name}: {reason}."
        case OSError(errno=errno.ENOSPC, strerror=str(reason)):
            return f"The output cannot be written: {reason}."
    return None
