"""Converts a RunPod job's `input` to a `Call` of the HTTP API. Three forms, tried in order:

    1  {"openai_route": "/v1/...", "openai_input": {...}}       RunPod's OpenAI gateway
    2  {"endpoint": "/prompt", "data": {...}}                   any route of the HTTP API
       {"route": "/tokenize", "method": "POST", "body": {...}}
    3  {"prompt" | "messages" | "prompts" | "items": ..., "sampling_params": {...}}

Each form may have the additional field `"headers": {"traceparent": "...", "x-session-id": "..."}`.
`traceparent` continues the client's trace, and `x-session-id` chooses one of several replicas.
Other headers are ignored, as over HTTP.

This module checks only the shape and the size. The server checks the route and the fields, as for
HTTP.
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
"""Fields that set the size of a stream's chunks in older workers. They are ignored with one log
line, because a chunk here contains everything since the last post."""
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
"""Fields of older workers: the accepted value, which has no effect, and the reason why other values
are refused."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A job's call, and the form of the job's output."""

    call: Call
    stream: bool
    """Whether the output is streamed in chunks, an error included."""
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
    """Returns the request in `job["input"]`.

    `max_body_bytes` is the limit of an HTTP body; here it limits the body as JSON. Raises
    `InvalidRequest` for an unknown form and `RequestTooLarge` for a larger body.
    """
    job_input = job.get("input")
    if job_input is None:
        raise InvalidRequest(f"The job has no `input`; {SHAPES}.", param="input")
    if not isinstance(job_input, dict):
        raise InvalidRequest(f"`input` must be an object; {SHAPES}.", param="input")
    headers: dict[str, str] = {}
    if "headers" in job_input:
        headers = _headers(job_input["headers"])
        job_input = {name: value for name, value in job_input.items() if name != "headers"}
    is_gateway = "openai_route" in job_input or "openai_input" in job_input
    if is_gateway:
        method, path, body = _gateway(job_input)
    elif "endpoint" in job_input or "route" in job_input:
        method, path, body = _route(job_input)
    elif job_input.keys() & {"prompt", "messages", "prompts", "items"}:
        method, path, body = "POST", "/prompt", _plain(job_input)
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
    """Returns the number of answers that `job` will generate: prompts times answers per prompt.

    Accepts any job, even an invalid one; a job without a list has one prompt. Example: three
    `prompts` with `n` = 2 give 6.
    """
    job_input = job.get("input")
    if not isinstance(job_input, dict):
        return 1
    inner = (job_input.get(name) for name in ("openai_input", "data", "body"))
    bodies: list[dict[str, Any]] = [
        value for value in (job_input, *inner) if isinstance(value, dict)
    ]
    lists = [body.get(name) for body in bodies for name in ("prompts", "items", "prompt")]
    # A list of integers is one prompt as token ids.
    lengths = [
        len(value)
        for value in lists
        if isinstance(value, list) and value and type(value[0]) is not int
    ]
    counts = [body.get(name) for body in bodies for name in ("n", "best_of")]
    answers = [count for count in counts if type(count) is int and count > 1]
    return max(lengths, default=1) * max(answers, default=1)


def _headers(headers: Any) -> dict[str, str]:
    """Returns a job's `headers` with names in lower case; a name's case does not matter, as in
    HTTP."""
    if headers is None:
        return {}
    if not isinstance(headers, dict) or not all(
        isinstance(value, str) for value in headers.values()
    ):
        raise InvalidRequest("`headers` must be an object of strings.", param="headers")
    return {name.lower(): value for name, value in headers.items()}


def _gateway(job_input: dict[str, Any]) -> tuple[str, str, Any]:
    """Returns method, path and body of the first form."""
    # Other keys are ignored, because RunPod does not document the keys that the gateway adds.
    path = _path(job_input.get("openai_route", "/v1/chat/completions"), "openai_route")
    body = job_input.get("openai_input") or None
    return "GET" if body is None else "POST", path, body


def _route(job_input: dict[str, Any]) -> tuple[str, str, Any]:
    """Returns method, path and body of the second form."""
    for names in (("endpoint", "route"), ("data", "body")):
        if all(name in job_input for name in names):
            raise InvalidRequest(
                f"`{names[0]}` and `{names[1]}` have the same meaning; send one of them."
            )
    if unknown := sorted(job_input.keys() - {"endpoint", "route", "method", "data", "body"}):
        raise InvalidRequest(
            f"`{unknown[0]}` is not a field of a job with a route.", param=unknown[0]
        )
    name = "endpoint" if "endpoint" in job_input else "route"
    path = _path(job_input[name], name)
    body = job_input.get("data", job_input.get("body"))
    api_route = routes.find(path)
    if not body and api_route is not None and api_route.method == "GET":
        body = None
        method = job_input.get("method", "GET")
    else:
        method = job_input.get("method", "POST")
    if not isinstance(method, str):
        raise InvalidRequest("`method` must be a string such as POST.", param="method")
    return method.upper(), path, body


def _plain(job_input: dict[str, Any]) -> dict[str, Any]:
    """Returns the body of the third form, including the fields of `sampling_params`."""
    for name, (neutral, reason) in REFUSED.items():
        if job_input.get(name, neutral) not in (neutral, None):
            raise InvalidRequest(
                f"`{name}` can only be {json.dumps(neutral)}: {reason}.", param=name
            )
    for name in UNNEEDED:
        if name in job_input:
            _log_once(f"Jobs contain `{name}`, which has no effect.")
    unused = {"sampling_params", *REFUSED, *UNNEEDED}
    body = {name: value for name, value in job_input.items() if name not in unused}
    sampling = job_input.get("sampling_params")
    if sampling is not None:
        if not isinstance(sampling, dict):
            raise InvalidRequest("`sampling_params` must be an object.", param="sampling_params")
        if duplicates := sorted(sampling.keys() & body.keys()):
            raise InvalidRequest(
                f"`{duplicates[0]}` is given both in `input` and in `sampling_params`; send it "
                "once.",
                param=duplicates[0],
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
