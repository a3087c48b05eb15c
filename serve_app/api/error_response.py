"""The HTTP response to a request that failed."""

from starlette.responses import JSONResponse

from serve_app.error_body import error_body
from serve_app.errors import ServeError


def error_response(
    error: ServeError, request_id: str, path: str, headers: dict[str, str]
) -> JSONResponse:
    """Returns the response with the body of `error`, in the shape of the API at `path`.

    `headers` are the headers of every response, such as the request's ids; `error.headers` are
    added.
    """
    body = error_body(error, request_id, path)
    return JSONResponse(body, error.http_status, headers | error.headers)
