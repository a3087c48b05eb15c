"""A GPU box without weights: loads and serves a synthetic checkpoint of Mixtral's size.

    python -m benchmarks.box /data/box --save benchmarks/results/box-h200.json
    python -m benchmarks.box /tmp/box --layers 1 --tiny --streams 1 2     # on a CPU

1. Writes random weights in our own form into the folder, with Mixtral's own tokenizer: 25 GB for
   32 layers. They are kept, and not written again. Needs mistral-common of requirements-dev.txt.
2. Runs `benchmarks.gpu`: the engine without a server.
3. Starts `mixtral-serve run` without its files in the page cache and without compiled kernels, and
   says the seconds of each phase beside a plain read of the same files.
4. Loads it over HTTP: prompts one at a time, then closed loops of many streams at temperature 0.7.
   Engine figures stand beside: its tokens/s are of decode steps alone, the server's include the
   prompts.

The exit code is 1 if a part of `benchmarks.gpu` failed or a request had an error. Without `--tiny`,
two cores take 2 s and more for a token of one layer, so answers would pass the request's deadline.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu
from benchmarks.box_load import BoxLoad
from benchmarks.box_server import Box
from benchmarks.report import new_parser, publish, say
from serve_app.machine.gpus import find_gpus

STREAMS = (1, 8, 32, 128)
CONTEXT = 512
"""Tokens of the prompts of all streams."""
ANSWER = 128
"""Tokens of their answers."""
MAX_MODEL_LEN = {False: 8192, True: 512}
"""`max_model_len` of the server; True is the toy model."""


def write_checkpoint(options: argparse.Namespace) -> Path:
    """Writes the checkpoint in a process of its own, which frees the GPU at its end."""
    name = "tiny" if options.tiny else "mixtral"
    layers = "all" if options.layers is None else options.layers
    checkpoint: Path = options.folder / f"{name}-{layers}-layers"
    run("tools.random_checkpoint", [str(checkpoint), *sizes(options)])
    return checkpoint


def sizes(options: argparse.Namespace) -> list[str]:
    """Returns the options that say how large the model is."""
    layers = [] if options.layers is None else ["--layers", str(options.layers)]
    return [*layers, *(["--tiny"] if options.tiny else [])]


def run(module: str, arguments: list[str]) -> int:
    """Runs a module of this repository; its exit code."""
    say(f"python -m {module} {' '.join(arguments)}")
    return subprocess.run([sys.executable, "-m", module, *arguments]).returncode


def engine_arguments(options: argparse.Namespace) -> list[str]:
    """Returns the arguments of `benchmarks.gpu` that measure the same sizes."""
    batches = [str(count) for count in options.streams]
    device = [] if find_gpus() else ["--device", "cpu"]
    measured = ["--parts", "step", "prompts", "--batches", *batches, "--streams", "1"]
    return [*sizes(options), *device, *measured, "--contexts", str(CONTEXT)]


async def load(
    asked: argparse.Namespace, load: BoxLoad, streams: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """Loads the server with the sizes that `benchmarks.gpu` was `asked` for."""
    context: int = asked.contexts[0]
    await load.warm_up(context)
    return {
        "prompts": await load.prompts(asked.prompts),
        "streams": await load.streams(streams, context),
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("folder", type=Path, help="keeps the checkpoint; on the disk to measure")
    parser.add_argument("--layers", type=int, help="instead of Mixtral's 32")
    parser.add_argument("--streams", type=int, nargs="+", default=list(STREAMS))
    parser.add_argument("--tiny", action="store_true", help="toy sizes: says nothing about speed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Returns the command."""
    options = parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = write_checkpoint(options)
    engine_file: Path = options.folder / "gpu.json"
    engine_file.unlink(missing_ok=True)  # of an earlier run
    asked = engine_arguments(options)
    code = run("benchmarks.gpu", [*asked, "--save", str(engine_file)])
    engine = json.loads(engine_file.read_text(encoding="utf-8"))
    figures = {name: engine[name] for name in ("device", "layers", "weights")}
    box = Box(checkpoint, options.folder, max(options.streams), MAX_MODEL_LEN[options.tiny])
    with box.cold() as (server, start):
        figures["start"] = start
        loads = BoxLoad(server, engine, ANSWER)
        figures |= asyncio.run(load(gpu.parse(asked), loads, options.streams))
    figures["engine"] = engine
    publish("box", figures, options.save)
    errors = sum(row["errors"] for row in (*figures["prompts"], *figures["streams"]))
    return 1 if code or errors else 0


if __name__ == "__main__":
    sys.exit(main())
