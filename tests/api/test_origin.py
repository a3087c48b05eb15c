"""Requests of web pages: which ones a browser would send here, and which ones are refused."""

from typing import Any

import httpx
import pytest

from tests.api.conftest import Endpoint

BODY = b'{"prompt": "Hi", "max_tokens": 1}'
JSON = {"content-type": "application/json"}
PLAIN = {"content-type": "text/plain"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
EVIL = "http://evil.example"


def ask(endpoint: Endpoint, headers: dict[str, str], path: str = "/prompt") -> httpx.Response:
    return httpx.post(f"{endpoint.url}{path}", content=BODY, headers=headers)


@pytest.mark.parametrize("origin", [EVIL, "https://evil.example", "null", "http://localhost:3000"])
@pytest.mark.parametrize(
    "kind", [PLAIN, FORM, {}, {"content-type": "text/plain; application/json"}]
)
def test_a_page_cannot_send_what_browsers_send_unasked(
    endpoint: Endpoint, origin: str, kind: dict[str, str]
) -> None:
    """A text or a form of another origin is a 403 with one sentence that names the setting, and the
    engine gets nothing."""
    engine = endpoint.serve()
    response = ask(endpoint, {"origin": origin, **kind})
    assert response.status_code == 403
    error = response.json()["error"]
    assert (error["code"], error["retry"]) == ("origin_not_allowed", False)
    assert f"of the origin {origin} " in error["message"]
    assert "`api.cors_origins`" in error["message"]
    assert engine.requests == []


def test_browsers_do_not_get_permission_for_json(endpoint: Endpoint) -> None:
    """The check relies on it: a preflight request of another origin permits nothing."""
    asked = {"origin": EVIL, "access-control-request-method": "POST"}
    response = httpx.options(f"{endpoint.url}/prompt", headers=asked)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(FORM, id="curl -d"),
        pytest.param({}, id="no content type"),
        pytest.param({"origin": "{url}", **JSON}, id="our page"),
        pytest.param({"origin": "{url}", **PLAIN}, id="a page of this server, as text"),
        pytest.param({"origin": "https://chat.example", **JSON}, id="a proxy that changes Host"),
        pytest.param(
            {"origin": "https://chat.example", "host": "chat.example", **JSON}, id="a TLS proxy"
        ),
        pytest.param({"origin": "http://gpu-box:8000", "host": "gpu-box:8000", **JSON}, id="name"),
        pytest.param({"origin": "http://a.local", "host": "a.local", **JSON}, id="mDNS"),
        pytest.param({"origin": "http://[::1]:8000", "host": "[::1]:8000", **JSON}, id="IPv6"),
        pytest.param({"origin": "chrome-extension://abc", **PLAIN}, id="extension"),
        pytest.param({"origin": "app://obsidian.md", **JSON}, id="desktop app"),
        pytest.param({"host": "gpu.example.com", **FORM}, id="curl to a public name"),
    ],
)
def test_clients_of_users_pass(endpoint: Endpoint, headers: dict[str, str]) -> None:
    """Clients without an origin, our page behind a proxy, extensions and apps get an answer."""
    filled = {name: value.replace("{url}", endpoint.url) for name, value in headers.items()}
    assert ask(endpoint, filled).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example:8000", "null"])
def test_a_rebound_name_is_refused(
    endpoint: Endpoint, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page whose public name became this server's address is a 403, as JSON too; with API keys it
    is a 401, because the page has none."""
    rebound = {"origin": origin, "host": "evil.example:8000", **JSON}
    assert ask(endpoint, rebound).status_code == 403
    monkeypatch.setenv("API_KEYS", "k" * 16)
    endpoint.serve()
    assert ask(endpoint, rebound).status_code == 401
    assert ask(endpoint, rebound | {"authorization": f"Bearer {'k' * 16}"}).status_code == 200


@pytest.mark.parametrize("setting", ["*", f"https://a.example, {EVIL}"])
def test_the_setting_allows_an_origin(endpoint: Endpoint, setting: str) -> None:
    """`api.cors_origins` allows what would be refused, and nothing beside it."""
    endpoint.serve(None, api={"cors_origins": setting})
    args: dict[str, Any] = {"host": "evil.example", **PLAIN}
    assert ask(endpoint, {"origin": EVIL, **args}).status_code == 200
    other = ask(endpoint, {"origin": "http://other.example", **args})
    assert other.status_code == (200 if setting == "*" else 403)


def test_anthropics_clients_get_their_type(endpoint: Endpoint) -> None:
    """The Messages API has Anthropic's type for a 403."""
    response = ask(endpoint, {"origin": EVIL, **PLAIN}, "/v1/messages")
    assert response.json()["error"]["type"] == "permission_error"
