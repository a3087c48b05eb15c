"""`/`, `/docs` and `/openapi.json`, without a browser."""

import asyncio
import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.openapi.models import OpenAPI
from jsonschema import Draft202012Validator

from serve_app.api.descriptions import DESCRIPTIONS, TAGS
from serve_app.api.pages import STATIC
from serve_app.api.route import Route
from serve_app.api.routes import ROUTES
from serve_app.config.key_file import KeyLimits, add_key
from serve_app.worker.job import parse
from tests.api.conftest import Endpoint
from tests.api.test_clients_requests import REQUESTS
from tests.fakes import server

PAGES = {"/": "index.html", "/docs": "docs.html"}
ADDRESSES = {"src", "href", "action", "formaction", "poster", "data", "srcset"}


class Elements(HTMLParser):
    """The elements of a page, with their attributes and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._tag = tag

    def handle_data(self, data: str) -> None:
        if self._tag in self.texts:
            self.texts[self._tag].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


@pytest.fixture
def document(http: httpx.Client) -> Any:
    return http.get("/openapi.json").json()


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_one_file_that_runs_what_it_holds_alone(http: httpx.Client, path: str) -> None:
    """The policy has the hash of each script and style, and names no other source."""
    response = http.get(path)
    assert response.text == (STATIC / PAGES[path]).read_text("utf-8")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    directives = dict(
        directive.strip().split(" ", 1)
        for directive in response.headers["content-security-policy"].split(";")
    )
    page = Elements(response.text)
    for tag in ("script", "style"):
        hashes = [base64.b64encode(hashlib.sha256(it.encode()).digest()) for it in page.texts[tag]]
        assert directives.pop(f"{tag}-src") == " ".join(f"'sha256-{it.decode()}'" for it in hashes)
    assert directives.pop("connect-src") == "'self'"
    assert directives.pop("img-src") == "data:"
    assert set(directives.values()) == {"'none'"}
    assert "default-src" in directives


@pytest.mark.parametrize("path", PAGES)
def test_a_page_asks_no_other_machine(http: httpx.Client, path: str) -> None:
    """Addresses are relative, so that a prefix works, or data; nothing is inline in attributes."""
    page = Elements(http.get(path).text)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name != "style"
        if name in ADDRESSES:
            assert re.match(r"data:|\.$|[a-z.]+$", value), value
    (script,) = page.texts["script"]
    assert not re.search(r"https?://|innerHTML|insertAdjacent|eval\(|localStorage|cookie", script)
    (style,) = page.texts["style"]
    assert not re.search(r"url\(|@import", style)


def test_the_pages_need_no_key(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with keys shows them, and its description says which routes ask for one."""
    monkeypatch.setenv("API_KEYS", "secret")
    endpoint.serve()
    with httpx.Client(base_url=endpoint.url) as http:
        assert [http.get(path).status_code for path in PAGES] == [200, 200]
        paths = http.get("/openapi.json").json()["paths"]
    assert {path for path, it in paths.items() if it.get("get", {}).get("security") == []} == {
        route.path for route in ROUTES if not route.needs_key
    }
    assert paths["/prompt"]["post"]["security"] == [{"key": []}]


def test_keys_in_a_file_are_asked_for_too(endpoint: Endpoint, tmp_path: Path) -> None:
    """The description of a server whose keys are in a file says that routes need one."""
    add_key(tmp_path / "keys.json", "ann", KeyLimits())
    endpoint.serve(api={"keys_file": str(tmp_path / "keys.json")})
    paths = httpx.get(f"{endpoint.url}/openapi.json").json()["paths"]
    assert httpx.get(f"{endpoint.url}/v1/models").status_code == 401
    endpoint.server.close()  # ends the thread that follows the file
    assert paths["/v1/models"]["get"]["security"] == [{"key": []}]


def test_a_job_gets_the_same(http: httpx.Client) -> None:
    """A call over the handle has the page's text, and the same description."""

    async def body(path: str) -> Any:
        items: list[Any] = [item async for item in server().call("GET", path, None, "r1")]
        return items[0]["body"]

    for path in PAGES:
        assert asyncio.run(body(path)) == http.get(path).text
    assert asyncio.run(body("/openapi.json")) == http.get("/openapi.json").json()


def test_every_route_is_described(document: Any) -> None:
    """The description has the routes of the table, each with its method, and no other."""
    assert set(DESCRIPTIONS) == {route.path for route in ROUTES}
    assert {each.tag for each in DESCRIPTIONS.values()} == set(TAGS)
    listed = {(method, path) for path, it in document["paths"].items() for method in it}
    assert listed == {(route.method.lower(), route.path.replace(":path", "")) for route in ROUTES}
    for route in ROUTES:
        assert (DESCRIPTIONS[route.path].request is not None) == (route.method == "POST")


def test_the_description_is_openapi_3_1(document: Any) -> None:
    """FastAPI's models of OpenAPI take it, every schema is a JSON schema, every reference leads."""
    OpenAPI.model_validate(document)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    referred = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert referred == set(schemas)
    assert not re.search(r'"(ge|le|gt|lt|title)": ', json.dumps(schemas))


def errors(document: Any, schema: Any, value: Any) -> list[str]:
    """Returns what jsonschema finds wrong with `value`."""
    whole = {**schema, "components": document["components"]}
    return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_examples_are_answered_as_described(
    http: httpx.Client, document: Any, route: Route
) -> None:
    """The example of a request follows its schema and is answered; so does the answer follow its.

    The example of the answer has the same fields as the answer.
    """
    path = route.path.replace(":path", "")
    operation = document["paths"][path][route.method.lower()]
    body = None
    if route.method == "POST":
        content = operation["requestBody"]["content"]["application/json"]
        body = content["example"]
        assert errors(document, content["schema"], body) == []
    response = http.request(route.method, path.replace("{id}", "tiny"), json=body)
    assert response.status_code == 200
    (media_type, answer), *_ = operation["responses"]["200"]["content"].items()
    assert response.headers["content-type"].startswith(media_type)
    if media_type == "application/json":
        assert errors(document, answer["schema"], response.json()) == []
        if path not in ("/tokenizer_info", "/openapi.json", "/v1/responses"):  # shortened examples
            assert set(answer["example"]) == set(response.json())
        refused = http.request(route.method, path.replace("{id}", "x"), json={"prompts": 7})
        if refused.status_code == 400:
            error = operation["responses"]["default"]["content"]["application/json"]
            assert errors(document, error["schema"], refused.json()) == []


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request["id"])
def test_what_clients_send_follows_the_schema(document: Any, request_: dict[str, Any]) -> None:
    """Requests that the server is known to answer are valid by the description."""
    if "job" in request_:
        call = parse(request_["job"], "r1", 10**6).call
        path, body = call.path, call.body
    else:
        path, body = request_["path"], request_["body"]
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert errors(document, schema, _without_nulls(body)) == []


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [HELLO], "tools": [WEATHER], "tool_choice": "auto"}),
        (
            "/v1/chat/completions",
            {
                "messages": [
                    HELLO,
                    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
                    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                ],
                "tools": [WEATHER],
            },
        ),
        ("/v1/completions", {"prompt": [[1, 5], [1, 6]], "stop": "x", "n": 2}),
        ("/prompt", {"items": ["a", {"prompt": "b", "temperature": 0}], "max_tokens": 3}),
        ("/v1/responses", {"input": [HELLO], "text": {"format": {"type": "text"}}}),
        ("/v1/messages", {"messages": [HELLO], "max_tokens": 9, "system": "Be kind."}),
    ],
)
def test_other_forms_follow_the_schema(
    http: httpx.Client, document: Any, path: str, body: dict[str, Any]
) -> None:
    """Tools, lists, strings in place of lists: answered, and valid by the description."""
    assert http.post(path, json=body).status_code == 200
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert errors(document, schema, body) == []


def _without_nulls(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_nulls(each) for name, each in value.items() if each is not None}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tempature": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_p": 2}),
        ("/v1/chat/completions", {"messages": []}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0.5}),
        ("/v1/completions", {"prompt": {"text": "x"}}),
        ("/prompt", {"prompts": "x"}),
        ("/tokenize", {"prompt": 3}),
        ("/detokenize", {}),
    ],
)
def test_the_schema_refuses_what_the_server_refuses(
    http: httpx.Client, document: Any, path: str, body: dict[str, Any]
) -> None:
    """A wrong body is a 400, and not valid by the description."""
    assert http.post(path, json=body).status_code == 400
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert errors(document, schema, body) != []
