"""A short soak with grammars: free, constrained, refused and cancelled requests."""

import asyncio

from benchmarks.soak_grammars import soak
from serve_app.api.server import MixtralServer
from serve_app.config.settings import Settings


def test_every_request_ends_as_its_kind_should() -> None:
    """Answers match their grammars, bad schemas are refused, and no KV block stays in use."""
    server = MixtralServer(Settings(model={"name": "tiny", "quantization": "none"}))
    figures = asyncio.run(soak(server, minutes=0.05, seed=2))
    server.close()
    assert figures["wrong"] == []
    assert sum(figures["counts"].values()) >= 16
