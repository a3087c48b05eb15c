"""Serve's router for a deployment handle: a conversation's calls go to one of several replicas.

Ray Serve imports `SessionRouter` by its path, `ROUTER["request_router_class"]`. It is Serve's
`ConsistentHashRouter`, which chooses a replica by the handle's `session_id`, with the bound of
`protocol/session.py` added: Serve's class leaves a replica only when that refuses a request, and a
replica refuses none before 20,000.

Serve's HAProxy mode refuses a router of a deployment that takes HTTP requests itself, so only a
deployment without HTTP has it.
"""

import asyncio
import math
from typing import Any

from serve_app.protocol.session import MAX_LOAD

ROUTER = {
    "request_router_class": f"{__name__}.SessionRouter",
    # A replica that is full passes its requests on to any other one.
    "request_router_kwargs": {"num_fallback_replicas": 1_000},
}
"""`request_router_config` of the deployment."""


def __getattr__(name: str) -> Any:
    """Makes `SessionRouter` when it is first asked for; importing this module imports no Ray."""
    if name != "SessionRouter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _router_class()
    return globals()[name]


def _router_class() -> type[Any]:
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]
        """Serve's router with bounded loads."""

        async def choose_replicas(
            self, candidate_replicas: list[Any], pending_request: Any = None
        ) -> list[list[Any]]:
            """Ranks of one replica each, in the order of the hash; those that are full come last.

            Replicas' loads are the requests that this router has sent and that have not ended. A
            replica of which it has heard nothing for 10 s counts as empty, and Serve asks it for
            its load before it sends a request.
            """
            # The requests of the choices before are sent meanwhile, and count then.
            await asyncio.sleep(0)
            ranks = await super().choose_replicas(candidate_replicas, pending_request)
            cache = self.replica_queue_len_cache
            loads = {rank[0].replica_id: cache.get(rank[0].replica_id) or 0 for rank in ranks}
            total = sum(loads.values()) + 1
            limit = math.ceil(total * MAX_LOAD / 100 / max(1, len(ranks)))
            return sorted(ranks, key=lambda rank: loads[rank[0].replica_id] >= limit)

    SessionRouter.__qualname__ = SessionRouter.__name__  # pickled by its path
    return SessionRouter
