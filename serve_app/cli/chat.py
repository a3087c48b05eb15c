"""`mixtral-serve chat`: a conversation with a running server, in the terminal.

Every turn sends the whole conversation to `/v1/chat/completions` and prints the answer as it
streams. /reset starts a new conversation, Ctrl-C stops an answer, Ctrl-D leaves. Standard output
has the answers alone. If standard input is no terminal, a refused turn or Ctrl-C ends the command.
"""

import io
import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from serve_app.config.serve_config import ConfigError

HELP = "Ctrl-C stops an answer, /reset starts anew, Ctrl-D leaves."
TIMEOUT = httpx.Timeout(10, read=None)
"""Timeouts in seconds. Reading has none, because a request may wait long in the queue."""
PREFIX = "data: "
END = "[DONE]"


class ChatError(Exception):
    """The server refused a request or cannot be reached. The message is one sentence."""


class Chat:
    """One conversation. `messages` are its messages so far, in OpenAI's form."""

    def __init__(self, url: str, key: str | None, model: str | None, system: str | None) -> None:
        """`model` None means the first one that the server lists; `key` None sends no key."""
        headers = {b"Authorization": f"Bearer {key}".encode()} if key else {}
        # OpenAI's clients are given the same address with `/v1`.
        url = url.rstrip("/").removesuffix("/v1")
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)
        except httpx.InvalidURL:
            raise ConfigError(f"`--url`: {url} is not a URL.") from None
        self._model = model
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._reset()

    def run(self) -> int:
        """Reads user messages from standard input until its end.

        Returns the exit code: 1 if the server does not answer, or refuses a turn that no user typed
        in a terminal.
        """
        import readline  # noqa: F401  # arrow keys and history for input()

        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a pipe may have any bytes
        with self._http:
            try:
                self._model = self._model or self._first_model()
                print(f"{self._model} at {self._http.base_url}. {HELP}", file=sys.stderr)
                while (text := _read()) is not None:
                    if text == "/reset":
                        self._reset()
                    elif text:
                        self._turn(text)
            except ChatError as error:
                print(error, file=sys.stderr)
                return 1
        return 0

    def _reset(self) -> None:
        system = {"role": "system", "content": self._system or ""}
        self.messages = [system] if self._system else []

    def _turn(self, text: str) -> None:
        """Sends `text` and prints the answer. If it is refused, the conversation does not change.

        Raises `ChatError` if it is refused, and no user can send another one.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in self._stream():
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print(" [stopped]", end="")
        except ChatError as error:
            self.messages.pop()
            if answer:
                print()
            if not sys.stdin.isatty():
                raise
            print(error, file=sys.stderr)
            return
        print()
        self.messages.append({"role": "assistant", "content": answer})

    def _stream(self) -> Iterator[str]:
        """Yields the answer's text in pieces. Raises `ChatError`."""
        body = {"model": self._model, "messages": self.messages, "stream": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise ChatError(_message(response))
                for line in response.iter_lines():
                    if line.startswith(PREFIX) and (data := line.removeprefix(PREFIX)) != END:
                        yield _text(json.loads(data))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _first_model(self) -> str:
        try:
            response = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise ChatError(_message(response))
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ChatError(
                f"What answers at {self._http.base_url} has no model; correct `--url`."
            ) from None

    def _unreachable(self, error: httpx.HTTPError) -> ChatError:
        if isinstance(error, httpx.ConnectError):
            return ChatError(
                f"No server answers at {self._http.base_url}; start one with `mixtral-serve run`."
            )
        if isinstance(error, httpx.UnsupportedProtocol):
            return ChatError("`--url` should begin with http:// or https://.")
        return ChatError(f"The connection to {self._http.base_url} broke ({type(error).__name__}).")


def _read() -> str | None:
    """Returns a stripped line from standard input; None at its end."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()  # drops the typed line, as a shell does
        except EOFError:
            if sys.stdin.isatty():
                print()  # leaves the line of the prompt
            return None


def _text(chunk: dict[str, Any]) -> str:
    """Returns the text in one chunk of a stream. Raises `ChatError` for an error in its place."""
    if "error" in chunk:
        raise ChatError(chunk["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


def _message(response: httpx.Response) -> str:
    """Returns the server's own sentence about a refused request, or its status."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"The server answered {response.status_code} {response.reason_phrase}."
