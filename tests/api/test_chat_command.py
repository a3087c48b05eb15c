"""`mixtral-serve chat` against the real HTTP app, with a scripted engine."""

import io
import os
import signal
import sys
import threading

import pytest

from serve_app.cli.chat import Chat
from serve_app.cli.commands import main
from serve_app.errors import OutOfMemory
from tests.api.conftest import Endpoint
from tests.fakes import FakeEngine
from tests.node.test_haproxy_program import QuietServer, Replica


class Input(io.StringIO):
    """Standard input; a test writes what a user types, and rewinds."""

    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Input:
    """Standard input, which is a pipe until a test changes that."""
    stdin = Input()
    monkeypatch.setattr(sys, "stdin", stdin)
    return stdin


def type_lines(stdin: Input, *lines: str) -> None:
    stdin.write("".join(f"{line}\n" for line in lines))
    stdin.seek(0)


def test_a_turn_prints_the_answer(
    endpoint: Endpoint, typed: Input, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of the input ends the conversation with exit code 0; a script gets the answer
    alone."""
    type_lines(typed, "Hi", "")
    assert main(["chat", "--url", endpoint.url]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(f"tiny at {endpoint.url}")
    assert printed.out == "Hello there.\n"


def test_the_conversation_grows_until_reset(endpoint: Endpoint, typed: Input) -> None:
    """Every turn sends the earlier ones; the system message outlives /reset."""
    talk = Chat(endpoint.url, None, None, "Be brief.")
    type_lines(typed, "One", "/reset", "Two", "Three")
    talk.run()
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [it["content"] for it in talk.messages if it["role"] == "user"] == ["Two", "Three"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_refused_turn_is_not_part_of_it(
    endpoint: Endpoint, typed: Input, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    """The server's sentence is printed, also for a failure inside the stream. In a terminal the
    next turn is read; a script gets exit code 1 at once."""
    engine = endpoint.serve(FakeEngine(error=OutOfMemory("No memory.")))
    talk = Chat(endpoint.url, None, None, None)
    typed.is_terminal = is_terminal
    type_lines(typed, "Hi", "Hi again")
    assert talk.run() == (0 if is_terminal else 1)
    assert talk.messages == []
    num_turns = 2 if is_terminal else 1
    assert len(engine.requests) == num_turns
    assert capsys.readouterr().err.count("No memory.") == num_turns


@pytest.mark.parametrize("is_terminal", [True, False])
def test_ctrl_c_stops_the_answer_alone(
    endpoint: Endpoint, typed: Input, capsys: pytest.CaptureFixture[str], is_terminal: bool
) -> None:
    """The server frees the request. In a terminal, what has arrived is kept, and the next turn is
    read; a script ends."""
    engine = endpoint.serve(FakeEngine(is_endless=True))
    talk = Chat(endpoint.url, None, None, None)

    def interrupt() -> None:
        engine.begun.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    typed.is_terminal = is_terminal
    type_lines(typed, "Tell a story")
    if is_terminal:
        assert talk.run() == 0
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
        assert f"{talk.messages[1]['content']} [stopped]\n" in capsys.readouterr().out
    else:
        with pytest.raises(KeyboardInterrupt):
            talk.run()
    thread.join()
    assert engine.left.wait(30)


def test_keys_come_from_the_environment(
    endpoint: Endpoint,
    typed: Input,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the key the server's refusal is the error; with it the server answers."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("API_KEYS", "first,second")
    endpoint.serve()
    monkeypatch.delenv("API_KEYS")
    assert main(["chat", "--url", endpoint.url]) == 1
    assert "API key" in capsys.readouterr().err
    monkeypatch.setenv("API_KEYS", "first,second")
    type_lines(typed, "Hi")
    assert main(["chat", "--url", endpoint.url]) == 0


def test_the_address_may_be_that_of_openais_clients(
    endpoint: Endpoint, typed: Input, capsys: pytest.CaptureFixture[str]
) -> None:
    """`/v1` at the end is the same server; an address without a scheme is one sentence."""
    type_lines(typed, "Hi")
    assert main(["chat", "--url", f"{endpoint.url}/v1/"]) == 0
    assert "Hello there." in capsys.readouterr().out
    assert main(["chat", "--url", endpoint.url.removeprefix("http://")]) == 1
    assert capsys.readouterr().err == "`--url` should begin with http:// or https://.\n"


def test_a_pipe_may_have_any_bytes(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that are no UTF-8 become U+FFFD, and the turn is answered."""
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff Hi\n"), "utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    talk = Chat(endpoint.url, None, None, None)
    assert talk.run() == 0
    assert talk.messages[0]["content"] == "\ufffd Hi"
    assert "Hello there." in capsys.readouterr().out


def test_a_key_may_have_any_characters(
    endpoint: Endpoint, typed: Input, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that is not ASCII reaches the server as UTF-8, as the server reads its own."""
    monkeypatch.setenv("API_KEYS", "schlüssel")
    endpoint.serve()
    type_lines(typed, "Hi")
    assert main(["chat", "--url", endpoint.url]) == 0


def test_a_wrong_address_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """Another web server, whose answer is no list of models, and a text that is no URL."""
    with QuietServer(("127.0.0.1", 0), Replica) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        assert main(["chat", "--url", f"http://127.0.0.1:{other.server_port}"]) == 1
        thread.join()
    assert main(["chat", "--url", "http://a:b"]) == 1
    assert capsys.readouterr().err == (
        f"What answers at http://127.0.0.1:{other.server_port} has no model; correct `--url`.\n"
        "`--url`: http://a:b is not a URL.\n"
    )


def test_no_server_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the address and the command that starts a server."""
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err == (
        "No server answers at http://127.0.0.1:9; start one with `mixtral-serve run`.\n"
    )
