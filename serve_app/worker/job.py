"""Converts a RunPod job's `input` to a `Call` of the HTTP API. Three forms, tried in order:

    1  {"openai_route": "/v1/...", "openai_input": {...}}       RunPod's OpenAI gateway
    2  {"endpoint": "/prompt", "data": {...}}                   any route of the HTTP API
       {"route": "/tokenize", "method": "POST", "body": {...}}
    3  {"prompt" | "messages" | "prompts" | "items": ..., "sampling_params": {...}}

Each may have `"headers": {"traceparent": "...", "x-session-id": "..."}` beside these. The first
continues the client's trace, the second chooses one of several replicas. Other headers are ignored,
as unknown headers are over HTTP.

Checks the shape and the size alone. The server checks route and fields, as for HTTP.
"""

import functools
import json
import logging
from dataclasses import dataclass
from typing import Any

from serve_app.api import routes
from serve_app.errors import InvalidRequest, RequestTooLarge
from serve_app.protocol.call import TRACEPARENT, Call
from serve_app.protocol.session import SESSION_ID

log = logging.getLogger(__name__)

SHAPES = (
    "send `prompt`, `messages`, `prompts` or `items`, or `endpoint` with `data`, "
    "or `openai_route` with `openai_input`"
)
UNNEEDED = ("max_batch_size", "min_batch_size", "batch_size_growth_factor")
"""Fields with which older workers set the size of a stream's chunks. They are accepted and ignored,
with one log line: a chunk contains everything since the last post."""
REFUSED = {
    "refresh_worker": (
        False,
        "a worker keeps nothing of a job, and replaces a broken engine itself",
    ),
    "apply_chat_template": (
        True,
        'raw text is continued by {"endpoint": "/v1/completions", "data": {...}}',
    ),
}
"""Fields of older workers: the only accepted value, which changes nothing, and the reason for
refusing another."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """The call of a job, and the form of its output."""

    call: Call
    stream: bool
    """Whether the output is chunks. A failure is then a chunk too."""
    is_gateway: bool
    """Whether the job comes from RunPod's OpenAI gateway."""

    @property
    def sse(self) -> bool:
        """Whether the chunks are texts of server-sent events, which the gateway forwards."""
        return self.stream and self.is_gateway

    @property
    def is_list(self) -> bool:
        """Whether the output is a list: the chunks of a stream, or the gateway's list with one
        object."""
        return self.stream or self.is_gateway


def parse(job: dict[str, Any], request_id: str, max_body_bytes: int) -> JobRequest:
    """Returns the request in `job["input"]`. Raises `InvalidRequest` for one that cannot be read.

    `max_body_bytes` is the limit of an HTTP body; here it limits the body written as JSON.
    """
    given = job.get("input")
    if given is None:
        raise InvalidRequest(f"The job has no `input`; {SHAPES}.", param="input")
    if not isinstance(given, dict):
        raise InvalidRequest(f"`input` must be an object; {SHAPES}.", param="input")
    headers: dict[str, str] = {}
    if "headers" in given:
        headers = _headers(given["headers"])
        given = {name: value for name, value in given.items() if name != "headers"}
    is_gateway = "openai_route" in given or "openai_input" in given
    if is_gateway:
        method, path, body = _gateway(given)
    elif "endpoint" in given or "route" in given:
        method, path, body = _route(given)
    elif given.keys() & {"prompt", "messages", "prompts", "items"}:
        method, path, body = "POST", "/prompt", _plain(given)
    else:
        raise InvalidRequest(f"`input` has no field that names a request; {SHAPES}.", param="input")
    try:
        text = json.dumps(body, allow_nan=False, ensure_ascii=False)
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        raise InvalidRequest(
            "The body is not valid JSON: it contains a NaN or an infinity, or is nested too deeply."
        ) from None
    if num_bytes > max_body_bytes:
        raise RequestTooLarge(
            f"The body is larger than the {max_body_bytes} bytes that are allowed."
        )
    stream = method == "POST" and isinstance(body, dict) and body.get("stream") is True
    call = Call(
        method,
        path,
        body,
        request_id,
        traceparent=headers.get(TRACEPARENT),
        session_id=headers.get(SESSION_ID),
    )
    return JobRequest(call, stream, is_gateway)


def num_prompts(job: dict[str, Any]) -> int:
    """Returns how many prompts the list in `job` has, whatever its shape; 1 without a list.

    A prompt with several answers counts as several.
    """
    given = job.get("input")
    if not isinstance(given, dict):
        return 1
    inner = (given.get(name) for name in ("openai_input", "data", "body"))
    bodies: list[dict[str, Any]] = [each for each in (given, *inner) if isinstance(each, dict)]
    lists = [body.get(name) for body in bodies for name in ("prompts", "items", "prompt")]
    # A list of integers is one prompt as token ids.
    lengths = [
        len(each) for each in lists if isinstance(each, list) and each and type(each[0]) is not int
    ]
    counts = [body.get(name) for body in bodies for name in ("n", "best_of")]
    answers = [count for count in counts if type(count) is int and count > 1]
    return max(lengths, default=1) * max(answers, default=1)


def _headers(headers: Any) -> dict[str, str]:
    """Returns a job's `headers` with names in lower case; a name's case does not matter, as in
    HTTP."""
    if headers is None:
        return {}
    if not isinstance(headers, dict) or not all(isinstance(it, str) for it in headers.values()):
        raise InvalidRequest("`headers` must be an object of strings.", param="headers")
    return {name.lower(): value for name, value in headers.items()}


def _gateway(given: dict[str, Any]) -> tuple[str, str, Any]:
    """Returns method, path and body of the first form."""
    # Other keys are ignored: which ones the gateway adds is not documented.
    path = _path(given.get("openai_route", "/v1/chat/completions"), "openai_route")
    body = given.get("openai_input") or None
    return "GET" if body is None else "POST", path, body


def _route(given: dict[str, Any]) -> tuple[str, str, Any]:
    """Returns method, path and body of the second form."""
    for names in (("endpoint", "route"), ("data", "body")):
        if all(name in given for name in names):
            raise InvalidRequest(
                f"`{names[0]}` and `{names[1]}` have the same meaning; send one of them."
            )
    if unknown := sorted(given.keys() - {"endpoint", "route", "method", "data", "body"}):
        raise InvalidRequest(
            f"`{unknown[0]}` is not a field of a job with a route.", param=unknown[0]
        )
    name = "endpoint" if "endpoint" in given else "route"
    path = _path(given[name], name)
    body = given.get("data", given.get("body"))
    api_route = routes.find(path)
    if not body and api_route is not None and api_route.method == "GET":
        body = None
        method = given.get("method", "GET")
    else:
        method = given.get("method", "POST")
    if not isinstance(method, str):
        raise InvalidRequest("`method` must be a string such as POST.", param="method")
    return method.upper(), path, body


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of the third form, including the fields of `sampling_params`."""
    for name, (neutral, reason) in REFUSED.items():
        if given.get(name, neutral) not in (neutral, None):
            raise InvalidRequest(
                f"`{name}` can only be {json.dumps(neutral)}: {reason}.", param=name
            )
    for name in UNNEEDED:
        if name in given:
            _log_once(f"Jobs contain `{name}`, which has no effect.")
    unused = {"sampling_params", *REFUSED, *UNNEEDED}
    body = {name: value for name, value in given.items() if name not in unused}
    sampling = given.get("sampling_params")
    if sampling is not None:
        if not isinstance(sampling, dict):
            raise InvalidRequest("`sampling_params` must be an object.", param="sampling_params")
        if twice := sorted(sampling.keys() & body.keys()):
            raise InvalidRequest(
                f"`{twice[0]}` is given both in `input` and in `sampling_params`; send it once.",
                param=twice[0],
            )
        body |= sampling
    return body


@functools.cache
def _log_once(line: str) -> None:
    log.info("%s", line)


def _path(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise InvalidRequest(f"`{name}` must be a path such as /prompt.", param=name)
    return value
