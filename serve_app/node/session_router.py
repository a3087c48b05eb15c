"""SessionRouter: sends all calls of a conversation through a deployment handle to the same replica.

Ray Serve imports `SessionRouter` by its path, `ROUTER["request_router_class"]`. It extends Serve's
`ConsistentHashRouter`, which chooses a replica by the handle's `session_id`, with the load limits
of `protocol/session.py`: Serve's class avoids a replica only if it refuses a request, which a
replica does from 20,000 requests on. Serve's HAProxy mode does not support a router in a deployment
that serves HTTP itself, so only a deployment without HTTP uses it.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

from serve_app.protocol.session import KEEP_LOAD, KEEP_MORE, NEW_LOAD, NUM_KEPT

ROUTER = {
    "request_router_class": f"{__name__}.SessionRouter",
    # A replica that is full passes its requests on to any other one.
    "request_router_kwargs": {"num_fallback_replicas": 1_000},
}
"""`request_router_config` of the deployment."""
Replica = TypeVar("Replica", bound=Hashable)


class Conversations(Generic[Replica]):
    """The replica of each conversation."""

    def __init__(self) -> None:
        self._replicas: OrderedDict[str, Replica] = OrderedDict()

    def ranked(self, session: str | None, loads: dict[Replica, int]) -> list[Replica]:
        """Returns the replicas in the order in which to offer them a request.

        `loads` are their unfinished requests, in the order of the hashes for `session`. The first
        replica of the result becomes the replica of the conversation. `session` is None for a
        request without a conversation.

        Example: a conversation's replica has 6 requests, the other two have 1 and 2. The mean with
        the new request is 10 / 3. The limit is 110 % of the mean, rounded down, plus 1: 4. So the
        conversation counts as new.
        """
        mean = (sum(loads.values()) + 1) / max(1, len(loads))
        current = self._replicas.get(session) if session is not None else None
        if (
            current is not None
            and loads.get(current, math.inf) > mean * KEEP_LOAD // 100 + KEEP_MORE
        ):
            current = None
        limit = math.ceil(mean * NEW_LOAD / 100)
        order = sorted(loads, key=lambda replica: (replica != current, loads[replica] >= limit))
        if session is not None and order:
            self._replicas[session] = order[0]
            self._replicas.move_to_end(session)
            if len(self._replicas) > NUM_KEPT:
                self._replicas.popitem(last=False)
        return order


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
        """Serve's router with load limits per replica."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._conversations = Conversations[Any]()

        async def choose_replicas(
            self, candidate_replicas: list[Any], pending_request: Any = None
        ) -> list[list[Any]]:
            """Returns ranks of one replica each, in the order of `Conversations.ranked`.

            A replica's load is the number of unfinished requests that this router has sent to it. A
            replica that has reported nothing for 10 s counts as empty; Serve queries its load
            before sending a request.
            """
            # Lets earlier chosen requests be sent, so that they count.
            await asyncio.sleep(0)
            ranks = await super().choose_replicas(candidate_replicas, pending_request)
            cache = self.replica_queue_len_cache
            by_id = {rank[0].replica_id: rank for rank in ranks}
            loads = {replica: cache.get(replica) or 0 for replica in by_id}
            session = pending_request.metadata.session_id if pending_request is not None else None
            return [
                by_id[replica] for replica in self._conversations.ranked(session or None, loads)
            ]

    SessionRouter.__qualname__ = SessionRouter.__name__  # pickled by its path
    return SessionRouter
