"""Times a call through a deployment handle with Serve's router and with `SessionRouter`.

Starts Ray and two deployments of four replicas that answer at once, and calls each 300 times, one
call after another and in turn. Prints JSON: median microseconds of a call with each router, and of
finding a body's session.
"""

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve

from benchmarks.empty_deployment import SERVE_LOGGING, start_ray
from serve_app.node.client import DeploymentClient
from serve_app.node.session_router import ROUTER
from serve_app.protocol.call import Call
from serve_app.protocol.session import session_of

CALLS = 300
BODY = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France? " * 40},
    ]
}


class Answer:
    """Answers at once."""

    async def call(self, *_: object) -> AsyncIterator[dict[str, Any]]:
        yield {"status": 200, "body": {}}


def deployed(name: str, **options: Any) -> DeploymentClient:
    """Returns a client of four replicas."""
    deployment = serve.deployment(
        name=name,
        num_replicas=4,
        max_ongoing_requests=20_000,
        ray_actor_options={"num_cpus": 0.1},
        **options,
    )
    bound = deployment(Answer).bind()
    handle = serve.run(bound, name=name, route_prefix=None, logging_config=SERVE_LOGGING)
    return DeploymentClient(handle, 60)


async def call_us(clients: dict[str, DeploymentClient]) -> dict[str, float]:
    """Returns the median microseconds of a call of each client."""
    times: dict[str, list[float]] = {name: [] for name in clients}
    for number in range(CALLS):
        for name, client in clients.items():
            call = Call("POST", "/v1/chat/completions", BODY, str(number))
            began = time.perf_counter()
            async for _ in client(call):
                pass
            times[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(each) * 1e6, 1) for name, each in times.items()}


def session_us() -> float:
    """Returns the microseconds to find the session of `BODY`."""
    call = Call("POST", "/v1/chat/completions", BODY, "")
    began = time.perf_counter()
    for _ in range(10_000):
        session_of(call)
    return round((time.perf_counter() - began) / 10_000 * 1e6, 2)


def main() -> None:
    """Prints the figures of both routers."""
    start_ray()
    clients = {
        "serve": deployed("serve"),
        "session": deployed("session", request_router_config=ROUTER),
    }
    found = asyncio.run(call_us(clients))
    print(json.dumps({"call_us": found, "session_of_us": session_us()}), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
