"""The handlers of the routes for the server's state and its models."""

import asyncio
from typing import TYPE_CHECKING

from serve_app import __version__
from serve_app.api.metrics.metrics import CONTENT_TYPE
from serve_app.protocol.call import Call, JsonObject, JsonReply, Reply, TextReply

if TYPE_CHECKING:
    from serve_app.api.served_model import ServedModel

MODELS = "/v1/models"


async def health(served: "ServedModel", call: Call) -> Reply:
    """Returns the full state, with status 503 while draining."""
    return JsonReply(served.health(), status=503 if served.is_draining else 200)


async def ping(served: "ServedModel", call: Call) -> Reply:
    """Returns only the status, with HTTP status 503 while draining."""
    return JsonReply(*served.ping())


async def show_metrics(served: "ServedModel", call: Call) -> Reply:
    """Returns the metrics in Prometheus' text format."""
    # 200 while draining too: a scrape that fails would hide how the last requests end.
    # In a thread: with 5,000 API keys it takes 60 ms.
    text = await asyncio.to_thread(served.metrics.text, served.status)
    return TextReply(text, CONTENT_TYPE)


async def models(served: "ServedModel", call: Call) -> Reply:
    """Returns the served names."""
    return JsonReply({"object": "list", "data": [_card(served, name) for name in served.names]})


async def model(served: "ServedModel", call: Call) -> Reply:
    """Returns one served name."""
    name = call.path.removeprefix(f"{MODELS}/")
    served.check_model(name)
    return JsonReply(_card(served, name))


async def version(served: "ServedModel", call: Call) -> Reply:
    """Returns the version of this package, in vLLM's schema."""
    return JsonReply({"version": __version__})


def _card(served: "ServedModel", name: str) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "mixtral-serve",
        "max_model_len": served.inputs.max_model_len,
    }
