"""The table of routes: what follows from it at every endpoint."""

import asyncio
import re
from typing import Any

import httpx
import pytest

from serve_app.api.ingress import create_app
from serve_app.api.route import Route
from serve_app.api.routes import ROUTES, find, match
from serve_app.errors import RouteNotFound
from serve_app.worker.job import parse
from tests.api.conftest import Endpoint
from tests.fakes import server


def path_of(route: Route) -> str:
    """Returns a path that the route answers."""
    return re.sub("{.*}", "tiny", route.path)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_http_takes_a_routes_own_method_alone(http: httpx.Client, route: Route) -> None:
    """The route's method reaches its handler; another is a 405 with the header `Allow`."""
    other = "POST" if route.method == "GET" else "GET"
    assert http.request(route.method, path_of(route)).status_code in (200, 400)
    refused = http.request(other, path_of(route))
    assert (refused.status_code, refused.headers["allow"]) == (405, route.allow)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a_key_is_asked_for_where_the_table_says(
    endpoint: Endpoint, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, route: Route
) -> None:
    """The key is required, or not, also for a method that the route does not take."""
    monkeypatch.setenv("API_KEYS", "secret")
    endpoint.serve()
    for method in ("GET", "POST"):
        is_refused = http.request(method, path_of(route)).status_code == 401
        assert is_refused == route.needs_key


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_a_job_without_a_body_has_the_routes_method(route: Route) -> None:
    """A job without a method uses GET where the route takes GET, else POST."""
    request = parse({"input": {"route": path_of(route)}}, "r1", 10**6)
    assert (request.call.method, request.call.body) == (route.method, None)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_ray_serve_names_a_request_by_its_route(route: Route) -> None:
    """Serve's access log and metrics have the path of the table, for the route's method."""
    from ray.serve._private.thirdparty.get_asgi_route_name import (
        extract_route_patterns,
        get_asgi_route_name,
    )

    app = create_app(server)
    scope = {"type": "http", "method": route.method, "path": path_of(route), "root_path": ""}
    assert get_asgi_route_name(app, scope) == route.path
    methods = {pattern.path: pattern.methods for pattern in extract_route_patterns(app)}
    assert methods[route.path] == sorted(route.allow.split(", "))


@pytest.mark.parametrize("path", ["/v2/models", "/prompt/", "prompt", ""])
def test_other_paths_have_no_route(path: str) -> None:
    """Neither a prefix nor a slash at the end makes a path another route's."""
    assert find(path) is None


def test_a_refused_method_is_named_over_the_handle_too() -> None:
    """The error of a call has the sentence of the 405."""

    async def error() -> Any:
        (item,) = [item async for item in server().call("GET", "/prompt", None, "r1")]
        return item

    item = asyncio.run(error())
    assert item["status"] == 405
    assert item["error"]["error"]["message"] == "/prompt takes POST, not GET."


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("/chat/completions", "use /v1/chat/completions."),
        ("/v1/v1/messages", "use /v1/messages."),
        ("/v1/chat/completions/", "use /v1/chat/completions."),
        ("//v1/models", "use /v1/models."),
        ("/V1/Responses", "use /v1/responses."),
        ("/v1/prompt", "use /prompt."),
        ("/v1/embeddings", "GET /docs describes the routes."),
    ],
)
def test_an_unknown_path_is_answered_with_advice(path: str, advice: str) -> None:
    """The error names the route that a wrong base URL or a slash too many leads past."""
    with pytest.raises(RouteNotFound) as refused:
        match("POST", path)
    assert refused.value.message == f"There is no route {path}; {advice}"
