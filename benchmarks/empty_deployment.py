"""An empty Serve worker: Ray, and a deployment whose constructor imports torch.

`benchmarks.coldstart` compares the worker with it. Prints "ready" when a call has been answered.
"""

import logging

import ray
from ray import serve

SERVE_LOGGING = {"enable_access_log": False, "log_level": "WARNING"}


class Empty:
    """Imports torch and answers a number."""

    def __init__(self) -> None:
        import torch

        self.threads = torch.get_num_threads()

    def __call__(self) -> int:
        return self.threads


def start_ray() -> None:
    """Starts Ray and Serve as `serve_app.node.cluster` does: no dashboard, no proxy, a small object
    store."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=200_000_000,
        logging_level=logging.ERROR,
    )
    serve.start(proxy_location="Disabled", logging_config=SERVE_LOGGING)


def main() -> None:
    """Starts Ray, deploys, and ends after one answer."""
    start_ray()
    handle = serve.run(
        serve.deployment(Empty).bind(), route_prefix=None, logging_config=SERVE_LOGGING
    )
    handle.remote().result()
    print("ready", flush=True)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
