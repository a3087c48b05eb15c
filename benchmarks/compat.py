"""Unmodified clients against this server, each in an environment of its own: what works.

    python -m benchmarks.compat
    python -m benchmarks.compat openai anthropic
    python -m benchmarks.compat llm --url http://127.0.0.1:8000 --model tiny

Each client's program (`clients/`) uses every feature that the client offers for such a server, and
asserts the parsed result: its type, its schema, that a tool was called with arguments that its
schema allows. The tiny model's answers make no sense, and none is asked for. The server is
`mixtral-serve run` with the tiny model and an API key; with `--url` it is one that runs already,
and its key is read from OPENAI_API_KEY. The first run installs each client from its registry; the
environments are used again. A client that cannot be installed is named with the reason. The exit
code is 1 when a feature failed or a client is missing.
"""

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.clients.features import Server
from benchmarks.compat_clients import CLIENTS, Client
from benchmarks.peer_environments import PeerError
from benchmarks.report import new_parser, publish, say
from serve_app.machine.ports import free_port
from serve_app.tiny import CHECKPOINT
from tools.server_process import serving

ROOT = Path(__file__).parents[1]
CACHE = Path.home() / ".cache" / "mixtral-serve" / "clients"
FIRST = {"prompt": "x", "max_tokens": 1}

Result = dict[str, Any]
"""`{"client", "version", "feature", "passed", "error"}`."""


@contextmanager
def tiny_server(folder: Path) -> Iterator[Server]:
    """Runs `mixtral-serve run` with the tiny model, a key and a free port, until the block ends."""
    config = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    port = config["http_options"]["port"] = free_port()
    path = folder / "server.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("mixtral-serve")), "run", str(path)]
    url, key = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    with serving(command, {"API_KEYS": key}, url, FIRST, folder / "server.log", key=key):
        yield Server(url, "tiny", key, str(CHECKPOINT))


@contextmanager
def running_server(url: str, model: str) -> Iterator[Server]:
    """Yields the running server at `url`."""
    yield Server(url.rstrip("/"), model, os.environ.get("OPENAI_API_KEY", "none"), str(CHECKPOINT))


def run_program(
    command: list[str], limit_s: float, server: Server, features: list[str], folder: Path
) -> list[tuple[str, str | None]]:
    """Runs one client's program. Returns its features, each with its error.

    Features that the program did not reach have the reason why it ended. Its output is in `folder`,
    which is also the home folder of all clients.
    """
    results, output = folder / "results.jsonl", folder / "output.log"
    # A client finds its own package before this folder's.
    environment = os.environ | {"HOME": str(folder), "PYTHONWARNINGS": "default", "NO_COLOR": "1"}
    arguments = [server.url, server.model, server.key, server.tokenizer, str(results), *features]
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit_s)
            end = f"The program ended with code {process.returncode}; see {output}."
        except subprocess.TimeoutExpired:
            end = f"The program took longer than {limit_s:g} s; see {output}."
        finally:
            _end_group(process)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    names, *done = [json.loads(line) for line in lines] or [features or ["program"]]
    errors = {result["feature"]: result["error"] for result in done}
    return [(name, errors.get(name, end)) for name in names]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def try_client(
    client: Client, server: Server, options: argparse.Namespace, folder: Path
) -> list[Result]:
    """Installs and runs one client; a result for each of its features."""

    def result(version: str, feature: str, error: str | None) -> Result:
        return {
            "client": client.name,
            "version": version,
            "feature": feature,
            "passed": error is None,
            "error": error,
        }

    try:
        command, version = client.prepare(options.environments)
    except PeerError as error:
        return [result("", "installation", str(error))]
    folder.mkdir()
    found = run_program(command, client.limit_s, server, options.features, folder)
    return [result(version, *each) for each in found]


def table(results: list[Result]) -> list[str]:
    """Returns one line for each client in Markdown, then one for each failure."""
    lines = ["| client | version | works | does not |", "|---|---|---|---|"]
    for name in dict.fromkeys(result["client"] for result in results):
        of_client = [result for result in results if result["client"] == name]
        works = [result["feature"] for result in of_client if result["passed"]]
        fails = [result["feature"] for result in of_client if not result["passed"]]
        version, counted = of_client[0]["version"], f"{len(works)} of {len(of_client)}"
        lines.append(f"| {name} | {version} | {counted}: {', '.join(works)} | {', '.join(fails)} |")
    return lines


def main() -> int:
    """Returns the command; exit code 1 when a feature failed."""
    parser = new_parser(__doc__)
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(names))
    parser.add_argument("--url", help="of a server that runs already")
    parser.add_argument("--model", default="tiny", help="its model's name, with --url")
    parser.add_argument("--features", nargs="+", default=[], help="only these of each client")
    parser.add_argument("--environments", type=Path, default=CACHE, help="kept for the next run")
    options = parser.parse_args()
    if unknown := set(options.clients) - set(names):
        parser.error(f"no such client: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    # A run that is ended early ends the server that it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    folder = Path(tempfile.mkdtemp(prefix="compat-"))
    start = running_server(options.url, options.model) if options.url else tiny_server(folder)
    results: list[Result] = []
    with start as server:
        for client in CLIENTS:
            if not options.clients or client.name in options.clients:
                say(f"{client.name} ...")
                found = try_client(client, server, options, folder / client.name)
                results += found
                for each in found:
                    say(
                        "  works" if each["passed"] else "  FAILS",
                        each["feature"],
                        each["error"] or "",
                    )
    say(*table(results), sep="\n")
    failed = sum(not result["passed"] for result in results)
    say(f"{len(results) - failed} of {len(results)} features work. The logs are in {folder}.")
    publish("compat", {"results": results}, options.save)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
