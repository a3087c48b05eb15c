"""The handlers of the routes for the server's state and its models."""

from typing import TYPE_CHECKING

from serve_app import __version__
from serve_app.api.metrics.metrics import CONTENT_TYPE
from serve_app.protocol.call import Call, JsonObject, JsonReply, Reply, TextReply

if TYPE_CHECKING:
    from serve_app.api.server import MixtralServer

MODELS = "/v1/models"


async def health(server: "MixtralServer", call: Call) -> Reply:
    """Returns the full state, with status 503 while draining."""
    return JsonReply(server.health(), status=503 if server.is_draining else 200)


async def ping(server: "MixtralServer", call: Call) -> Reply:
    """Returns only the status, with HTTP status 503 while draining."""
    return JsonReply(*server.ping())


async def show_metrics(server: "MixtralServer", call: Call) -> Reply:
    """Returns the metrics in Prometheus' text format."""
    # 200 while draining too: a scrape that fails would hide how the last requests end.
    return TextReply(server.metrics.text(server.status), CONTENT_TYPE)


async def models(server: "MixtralServer", call: Call) -> Reply:
    """Returns the served names."""
    return JsonReply({"object": "list", "data": [_card(server, name) for name in server.names]})


async def model(server: "MixtralServer", call: Call) -> Reply:
    """Returns one served name."""
    name = call.path.removeprefix(f"{MODELS}/")
    server.check_model(name)
    return JsonReply(_card(server, name))


async def version(server: "MixtralServer", call: Call) -> Reply:
    """Returns the version of this package, in vLLM's schema."""
    return JsonReply({"version": __version__})


def _card(server: "MixtralServer", name: str) -> JsonObject:
    return {
        "id": name,
        "object": "model",
        "created": server.created,
        "owned_by": "mixtral-serve",
        "max_model_len": server.inputs.max_model_len,
    }
