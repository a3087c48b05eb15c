"""The only Ray Serve wiring: settings in, an application out.

One deployment, which is its own ingress: a second one in front would cost a Ray message for each
token. `import_path: serve_app.app:build_app` in the YAML; its `deployments:` overrides win.

No `from __future__ import annotations` here: Serve would then pass `args:` as a plain dict.
"""

import logging
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serve_app.config.settings import Settings
from serve_app.errors import EngineDead
from serve_app.loading import load as loading
from serve_app.loading.load import Loaded
from serve_app.loading.load_log import LoadLog

if TYPE_CHECKING:
    from ray.serve import Application

Load = Callable[[Settings, LoadLog], Loaded]

DEPLOYMENT = "mixtral"
SPARE_REQUESTS = 64
"""Places for what never enters the engine's queue: health, models, tokenising, refusals."""
LAST_WORDS_S = 1.0
"""Seconds between the discovery of a dead engine and the end of its process."""


def build_app(settings: Settings) -> "Application":
    """The Serve application of these settings. Touches no GPU, and no file."""
    return application(settings, loading.load)


def application(settings: Settings, load: Load) -> "Application":
    """`build_app` with another way to load, which the replica must be able to import."""
    from ray import serve

    from serve_app.api.server import MixtralServer

    def ingress() -> Any:
        # Evaluated on the replica, which alone needs FastAPI.
        from ray import serve

        from serve_app.api.ingress import create_app

        # Asked at each request: while the app is built there is no object yet.
        return create_app(lambda: serve.get_replica_context().servable_object)

    class Replica(MixtralServer):
        """The server, whose log lines go where Serve's do, and whose process ends with its engine.

        Serve would take three failed health checks, 15 s, to replace a replica whose engine is
        dead; a dead process it replaces at once.
        """

        def __init__(self, settings: Settings) -> None:
            ours, serves = logging.getLogger("serve_app"), logging.getLogger("ray.serve")
            ours.handlers, ours.propagate = serves.handlers, False
            ours.setLevel(serves.level)
            super().__init__(settings, load)

        def check_health(self) -> None:
            # Called before each request too.
            try:
                super().check_health()
            except EngineDead:
                end_process()
                raise

    engine = settings.engine
    deployment = serve.deployment(
        name=DEPLOYMENT,
        # Above the engine's own limits, so that a full queue is answered by us, with Retry-After.
        max_ongoing_requests=engine.max_num_seqs + engine.max_waiting + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": 1, "num_gpus": 0 if is_on_cpu(settings) else 1},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
        # A model that does not load now will not load a second later.
        max_constructor_retry_count=1,
    )
    return deployment(serve.ingress(ingress)(Replica)).bind(settings)


def end_process() -> None:
    """Ends this process with code 1, when those who are just being answered have heard it."""
    threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()


def is_on_cpu(settings: Settings) -> bool:
    """`auto` reserves a GPU for everything but the tiny model, which needs none."""
    if settings.model.device == "auto":
        return settings.model.name == "tiny"
    return settings.model.device == "cpu"
