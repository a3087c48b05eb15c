"""The pages in headless Chromium, which a machine may have or not."""

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve_app.api.metrics.metrics import NO_ROUTE
from serve_app.api.routes import ROUTES
from serve_app.errors import InternalError
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
PHONE = {"width": 390, "height": 844}
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # milliseconds; other tests share the machine
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox"],  # tests may run as root
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(endpoint: Endpoint, browser: Browser) -> Iterator[Open]:
    """Opens a path of the endpoint. Fails at the end for an error of a script or a request to
    another machine."""
    problems: list[str] = []
    contexts = []

    def check(url: str) -> None:
        if not url.startswith((f"{endpoint.url}/", "data:")):
            problems.append(url)

    def open_(path: str = "/", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: check(request.url))
        page.goto(f"{endpoint.url}{path}")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def answers(page: Page) -> Any:
    """Returns the answers that have ended."""
    return page.locator(".turn.model:not(.live)")


def test_an_answer_streams_with_its_figures(endpoint: Endpoint, open_page: Open) -> None:
    """The text, times, tokens and reason are shown; a second turn sends the first one again."""
    engine = endpoint.serve(FakeEngine(" One <b>two</b> three."))
    page = open_page()
    expect(page.locator("#status")).to_have_text("tiny · ready")
    page.get_by_role("button", name="Spell the word cat.").click()
    expect(answers(page)).to_have_count(1)
    expect(answers(page).locator(".text")).to_have_text("One <b>two</b> three.")  # text, not HTML
    expect(page.locator("#ttft")).to_have_text(re.compile(r"^\d+ ms$|^[\d.]+ s$"))
    expect(page.locator("#rate")).to_have_text(re.compile(r"^[\d.,]+$"))
    expect(page.locator("#reason")).to_have_text("stop")
    prompt_ids = engine.requests[0][0]
    num_tokens = len(engine.token_ids)
    expect(page.locator("#tokens")).to_have_text(f"{len(prompt_ids)} + {num_tokens}")
    # The answer cannot be faster than all of its tokens in the time of the first one (rounded).
    rate, first = (page.locator(name).inner_text().replace(",", "") for name in ("#rate", "#ttft"))
    first_s = float(first.split()[0]) / (1000 if first.endswith("ms") else 1)
    assert float(rate) * first_s <= 1.5 * num_tokens
    ask(page, "And again?")
    expect(answers(page)).to_have_count(2)
    again = engine.requests[1][0]
    assert len(again) > len(prompt_ids) + num_tokens
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_the_parameters_are_sent(endpoint: Endpoint, open_page: Open) -> None:
    """The values of the fields are sent to the engine; an empty field is not sent."""
    engine = endpoint.serve(FakeEngine())
    page = open_page()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("7")
    page.get_by_label("Seed").fill("3")
    ask(page, "Hello")
    expect(answers(page)).to_have_count(1)
    params = engine.requests[0][1]
    assert (params.temperature, params.max_tokens, params.seed) == (0, 7, 3)
    assert params.top_p == 1


def test_the_curl_command_asks_the_same(endpoint: Endpoint, open_page: Open) -> None:
    """Its words, as a shell splits them, are a request with the same prompt."""
    engine = endpoint.serve(FakeEngine())
    page = open_page()
    ask(page, "It's \"5 o'clock\" \\ $HOME")
    expect(answers(page)).to_have_count(1)
    words = shlex.split(page.locator("#curl").inner_text().replace("\\\n", ""))
    command, no_buffer, url, _, header, _, data = words
    assert (command, no_buffer) == ("curl", "-N")
    name, _, value = header.partition(": ")
    response = httpx.post(url, content=data, headers={name: value})
    assert response.text.endswith("data: [DONE]\n\n")
    assert engine.requests[1][0] == engine.requests[0][0]


def test_the_server_is_shown(open_page: Open) -> None:
    """The card has the model, its memory by part, KV blocks, load phases and notes."""
    page = open_page()
    expect(page.locator("#model")).to_contain_text("float32")
    expect(page.locator("#kv-text")).to_have_text("0 of 64 blocks")
    for part in ("experts", "attention", "head", "other", "KV cache"):
        expect(page.locator("#memory-legend")).to_contain_text(part)


def test_the_key_stays_in_the_tab(
    endpoint: Endpoint, open_page: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with keys is asked with the key that the user gives; a wrong one is named so."""
    monkeypatch.setenv("API_KEYS", "sesame")
    endpoint.serve()
    page = open_page()
    field, use = page.get_by_label("API key"), page.get_by_role("button", name="Use this key")
    expect(field).to_be_visible()
    field.fill("wrong")
    use.click()
    expect(page.locator("#key-note")).to_have_text("The server does not accept this key.")
    field.fill("sesame")
    use.click()
    expect(page.locator("#key")).to_be_hidden()
    ask(page, "Hello")
    expect(answers(page).locator(".text")).to_have_text("Hello there.")
    curl = page.locator("#curl").inner_text()
    assert '-H "Authorization: Bearer $API_KEY"' in curl
    assert "sesame" not in curl + page.url + page.content()
    kept = "() => [Object.values(sessionStorage), Object.keys(localStorage), document.cookie]"
    assert page.evaluate(kept) == [["sesame"], [], ""]


def test_errors_are_said_and_change_nothing(endpoint: Endpoint, open_page: Open) -> None:
    """A refused request and one that fails midway show the server's sentence."""
    page = open_page()
    page.get_by_label("Temperature").fill("9")
    ask(page, "Hello")
    expect(page.locator(".error").last).to_contain_text("`temperature`")
    page.get_by_label("Temperature").fill("")
    engine = endpoint.serve(FakeEngine("Half", error=InternalError("The step failed.")))
    ask(page, "Hello again")
    expect(page.locator(".error").last).to_have_text("The step failed.")
    expect(answers(page).last.locator(".text")).to_have_text("Half")
    assert len(engine.requests) == 1
    refused, failed = engine.requests[0][0], FakeEngine("Hello again").token_ids
    assert len(refused) < 2 * len(failed) + 20  # the refused question is not sent again


def test_stop_ends_the_request(endpoint: Endpoint, open_page: Open) -> None:
    """The server notices that the reader has gone, and the text so far stays."""
    engine = endpoint.serve(FakeEngine("Forever", is_endless=True))
    page = open_page()
    ask(page, "Hello")
    expect(page.locator(".turn.model .text")).to_contain_text("Forever")
    page.get_by_role("button", name="Stop").click()
    expect(answers(page).locator(".note")).to_contain_text("ended by stopped")
    assert engine.left.wait(10)


def test_a_page_of_another_origin_gets_no_answer(endpoint: Endpoint, browser: Browser) -> None:
    """Chromium sends its text, which is a 403, and asks before it sends JSON, which it then does
    not; a page of this server's own origin gets an answer to both."""
    engine = endpoint.serve()
    url = f"{endpoint.url}/prompt"
    send = """async ([url, type]) => {
        const options = {method: "POST", headers: {"content-type": type}, body: '{"prompt": "Hi"}'};
        return await fetch(url, options).then((it) => it.status, () => "blocked");
    }"""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{endpoint.url.replace('127.0.0.1', 'localhost')}/health")
        for kind in ("text/plain", "application/json"):
            assert page.evaluate(send, [url, kind]) == "blocked"
        statuses = endpoint.server.metrics.http_responses
        assert (statuses["/prompt", 403], statuses[NO_ROUTE, 405]) == (1, 1)
        assert engine.requests == []
        page.goto(f"{endpoint.url}/health")
        for kind in ("text/plain", "application/json"):
            assert page.evaluate(send, [url, kind]) == 200


def test_the_policy_stops_other_requests(open_page: Open) -> None:
    """A script in the page cannot reach another machine."""
    page = open_page()
    violated = page.evaluate(
        """() => new Promise((resolve) => {
            addEventListener("securitypolicyviolation", (it) => resolve(it.violatedDirective));
            fetch("https://example.com/").catch(() => {});
        })"""
    )
    assert violated == "connect-src"


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 800}], ids=["phone", "screen"])
def test_nothing_is_wider_than_the_window(endpoint: Endpoint, open_page: Open, size: Any) -> None:
    """Neither page scrolls sideways, in any view and with a long word."""
    endpoint.serve(FakeEngine("x" * 300, size=50))
    page = open_page(viewport=size)
    ask(page, "y" * 300)
    expect(answers(page)).to_have_count(1)
    is_wide = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"
    assert not page.evaluate(is_wide)
    if size is PHONE:
        for view, shown, hidden in (
            ("Settings", "#curl", "#log"),
            ("Server", "#memory", "#curl"),
            ("Chat", "#log", "#memory"),
        ):
            page.get_by_role("button", name=view, exact=True).click()
            expect(page.locator(shown)).to_be_visible()
            expect(page.locator(hidden)).to_be_hidden()
            assert not page.evaluate(is_wide)
    page.goto(f"{endpoint.url}/docs")
    for summary in page.locator("summary").all():
        summary.click()
    assert not page.evaluate(is_wide)


def test_the_docs_show_every_route(open_page: Open) -> None:
    """Each route of the table has its method, an example and its fields, without a key."""
    page = open_page("/docs")
    expect(page.locator(".route")).to_have_count(len(ROUTES))
    for route in ROUTES:
        title = f"{route.method}{route.path.replace(':path', '')}"
        expect(page.locator(".route h3", has_text=title).first).to_be_visible()
    chat = page.locator("#v1_chat_completions")
    chat.get_by_text("Fields of ChatRequest").click()
    expect(chat.locator(".field", has_text="messages").first).to_contain_text("required")
    command = shlex.split(chat.locator("pre").first.inner_text())
    assert httpx.post(command[1], content=command[-1]).status_code == 200
