"""SessionRouter: sends all calls of a conversation through a deployment handle to the same replica.

Ray Serve imports `SessionRouter` by its path, `ROUTER["request_router_class"]`. It extends Serve's
`ConsistentHashRouter`, which chooses a replica by the handle's `session_id`, with the load limit of
`protocol/session.py`: Serve's class avoids a replica only if it refuses a request, which a replica
does from 20,000 requests on. Serve's HAProxy mode does not support a router in a deployment that
serves HTTP itself, so only a deployment without HTTP uses it.
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
    """Creates `SessionRouter` at its first use, so that importing this module does not import
    Ray."""
    if name != "SessionRouter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _router_class()
    return globals()[name]


def _router_class() -> type[Any]:
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]
        """Serve's router with a load limit per replica."""

        async def choose_replicas(
            self, candidate_replicas: list[Any], pending_request: Any = None
        ) -> list[list[Any]]:
            """Returns ranks of one replica each, in the order of hashes; replicas at the limit come
            last.

            A replica's load is the number of unfinished requests that this router has sent to it. A
            replica that has reported nothing for 10 s counts as empty; Serve queries its load
            before sending a request.
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
