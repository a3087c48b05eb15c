"""The HTTP endpoint on a real socket, for all tests here.

The engine is a fake; the endpoint, the server behind it and uvicorn are real.
"""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn

from serve_app.api.ingress import create_app
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings
from tests.fakes import FakeEngine, server


class Endpoint:
    """A running uvicorn whose server a test may replace."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.server: MixtralServer = server()

    def serve(self, engine: FakeEngine | None = None, /, **args: Any) -> FakeEngine:
        """Lets this engine answer from now on, with these settings."""
        engine = engine or FakeEngine()
        self.server = server(engine, **args)
        return engine

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def anthropic(self, key: str = "none") -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def running() -> Iterator[Endpoint]:
    """One uvicorn for all tests here, on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # clients wait until uvicorn runs
        endpoint = Endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
        config = uvicorn.Config(create_app(lambda: endpoint.server), log_level="warning", ws="none")
        uvicorn_server = uvicorn.Server(config)
        thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
        thread.start()
        yield endpoint
        uvicorn_server.should_exit = True
        thread.join()


@pytest.fixture
def endpoint(running: Endpoint) -> Endpoint:
    """The HTTP endpoint, with an engine that answers `Hello there.`"""
    running.serve()
    return running


@pytest.fixture(scope="module")
def tiny() -> Iterator[MixtralServer]:
    """One server with the tiny model in float32."""
    server = MixtralServer(Settings(model={"name": "tiny", "quantization": "none"}))
    yield server
    server.close()


@pytest.fixture
def tiny_endpoint(running: Endpoint, tiny: MixtralServer) -> Endpoint:
    """The HTTP endpoint with the tiny model."""
    running.server = tiny
    return running


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url) as client:
        yield client
