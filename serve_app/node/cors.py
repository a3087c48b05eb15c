"""CORS headers for the answers of HAProxy and the health server.

A page of another origin can read an answer only with these headers. Replicas add them to their own
answers (`api/cors.py`). `protocol/cors.py` has the common parts.
"""

from collections.abc import Mapping, Sequence

from serve_app.protocol.cors import EXPOSED, MAX_AGE_S, METHODS

ALLOWED = "Access-Control-Allow-Methods"


def headers(origins: Sequence[str], request: Mapping[str, str]) -> dict[str, str]:
    """Returns the CORS headers for the answer to a request.

    `origins` are `ApiSettings.allowed_origins`. `request` has the request's headers, with names in
    lower case. The result is empty if the request has no allowed origin. For a preflight request it
    contains `ALLOWED`.
    """
    origin = request.get("origin")
    if origin is None or not {"*", origin} & set(origins):
        return {}
    answer = {
        "Access-Control-Allow-Origin": "*" if "*" in origins else origin,
        "Access-Control-Expose-Headers": ", ".join(EXPOSED),
        "Vary": "Origin",
    }
    if "access-control-request-method" in request:
        answer |= {
            ALLOWED: ", ".join(METHODS),
            "Access-Control-Allow-Headers": request.get("access-control-request-headers", ""),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
    return answer


def rules(origins: Sequence[str]) -> list[str]:
    """Returns the lines for HAProxy that answer preflight requests, and add CORS headers to answers
    without them."""
    if not origins:
        return []
    is_any = "*" in origins
    matched = "-m found" if is_any else f"-m str {' '.join(map(quoted, origins))}"
    allowed = "*" if is_any else "%[req.fhdr(origin)]"
    permission = {
        ALLOWED: quoted(", ".join(METHODS)),
        "Access-Control-Allow-Headers": "%[req.fhdr(access-control-request-headers)]",
        "Access-Control-Max-Age": str(MAX_AGE_S),
    }
    answer = {
        "Access-Control-Allow-Origin": "%[var(txn.origin)]",
        "Access-Control-Expose-Headers": quoted(", ".join(EXPOSED)),
        "Vary": "Origin",
    }
    header_arguments = "".join(f" hdr {name} {value}" for name, value in permission.items())
    return [
        f"    http-request set-var-fmt(txn.origin) {allowed} if {{ req.fhdr(origin) {matched} }}",
        "    acl is_allowed var(txn.origin) -m found",
        f"    http-request return status 200{header_arguments} if METH_OPTIONS is_allowed"
        " { req.fhdr(access-control-request-method) -m found }",
        "    http-after-response set-var(txn.has_cors) bool(true)"
        " if { res.fhdr(access-control-allow-origin) -m found }",
        *(
            f"    http-after-response set-header {name} {value}"
            " if is_allowed !{ var(txn.has_cors) -m bool }"
            for name, value in answer.items()
        ),
    ]


def quoted(text: str) -> str:
    """Returns `text` as one argument of a line in HAProxy's configuration."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'
