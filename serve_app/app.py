"""Builds the Ray Serve application, and checks a Serve YAML's keys.

There is one deployment, which is its own ingress: a second one in front of it would cost a Ray
message per token. Serve calls `build_app`, which `import_path:` in the YAML names; the YAML's
`deployments:` override the options set here.

`from __future__ import annotations` must not be used here: Serve would then pass `args:` as a plain
dict.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from serve_app.config import serve_config
from serve_app.config.log_format import use_json
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import EngineDead, ServeError
from serve_app.loading import load as loading
from serve_app.loading.load import Loaded
from serve_app.machine.ports import LOOPBACK
from serve_app.start_plan.device import choose_device
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)

Load = Callable[..., Loaded]
"""A function `load(settings, load_log)` or `load(settings, load_log, plan=plan)` that loads the
model."""

DEPLOYMENT = "mixtral"
IMPORT_PATH = "serve_app.app:build_app"
MAX_ONGOING_REQUESTS = 20_000
"""Maximum number of requests that Serve sends to a replica. It is far larger than the engine's
queue, so that the engine refuses the excess, which takes milliseconds. Requests whose body is still
arriving count too."""
MAX_QUEUED_REQUESTS = 1_000
"""Maximum number of further requests that wait in each of Serve's routers; Serve answers the rest
with 429."""
BACKPRESSURE_RETRY_S = 10
"""Seconds in `Retry-After` of Serve's own 429."""
EXIT_DELAY_S = 1.0
"""Seconds from the detection of a dead engine to the end of its process."""

PARENT_POLL_S = 1.0
"""Seconds between two checks whether the raylet, the parent of a replica's process, is alive."""


def build_app(settings: Settings) -> "Application":
    """Returns the Serve application for `settings`. Reads no file and queries no GPU."""
    # Serve logs a line before it makes a `Replica`, which changes the format of the others.
    is_json = settings.observability.is_json
    return application(settings, logging_config={"encoding": "JSON"} if is_json else None)


def application(
    settings: Settings,
    load: Load = loading.load,
    plan: StartPlan | None = None,
    *,
    logging_config: dict[str, str] | None = None,
) -> "Application":
    """The same as `build_app`, for a process on the replica's machine that has already made the
    `plan`.

    `load` replaces `loading.load.load`; the replica must be able to import it. `logging_config` is
    the deployment's; Serve prefers it to the application's.
    """
    from ray import serve

    device = choose_device(settings.model)
    deployment = serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": BACKPRESSURE_RETRY_S},
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if device == "cuda" else 0},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
        # A model that fails to load fails again a second later.
        max_constructor_retry_count=1,
        logging_config=logging_config,
    )
    ingress = _ingress(settings.api.allowed_origins)
    return deployment(serve.ingress(ingress)(_replica_class(load))).bind(settings, plan)


def _ingress(allowed_origins: list[str]) -> Callable[[], Any]:
    """Returns a function that builds the ASGI app on the replica; no other process imports it."""

    def build() -> Any:
        from ray import serve

        from serve_app.api.ingress import create_app

        # A function, because the object does not exist while the app is built.
        return create_app(lambda: serve.get_replica_context().servable_object, allowed_origins)

    return build


def _replica_class(load: Load) -> type[Any]:
    """Returns the deployment class; `load` is pickled with it."""
    from serve_app.api.server import MixtralServer

    class Replica(MixtralServer):
        """A server with Serve's logging, whose process ends with its engine and its raylet.

        Serve replaces a dead process at once, but a replica with a dead engine only after three
        failed health checks (15 s). A replica whose raylet is dead is unreachable for Serve and
        would keep its GPU.
        """

        def __init__(self, settings: Settings, plan: StartPlan | None = None) -> None:
            import ray

            from serve_app.api import early_answer
            from serve_app.api.metrics.ray_port import RayMetrics

            package_log, serve_log = logging.getLogger("serve_app"), logging.getLogger("ray.serve")
            package_log.handlers, package_log.propagate = serve_log.handlers, False
            package_log.setLevel(serve_log.level)
            if settings.observability.is_json:
                use_json(serve_log.handlers)
            end_with_parent()
            super().__init__(settings, load if plan is None else partial(load, plan=plan))
            early_answer.serves(self)
            if ray.is_initialized():
                RayMetrics(lambda: self.metrics.families(self.status)).start()
            if not settings.api.needs_key and ray.is_initialized():
                # A thread, because Serve's controller is asked.
                threading.Thread(target=warn_if_open, name="exposure", daemon=True).start()
            # Excludes the objects of the load, which live until the end, from garbage collection.
            # Without this, a large answer caused collections that blocked all threads for 350 ms.
            gc.freeze()

        def check_health(self) -> None:
            # Serve calls this every few seconds, and `failure` when a request has lost the engine.
            try:
                super().check_health()
            except EngineDead:
                exit_soon()
                raise

        def failure(self, error: Exception, request_id: str) -> ServeError:
            serve_error = super().failure(error, request_id)
            if isinstance(serve_error, EngineDead):
                # Ends the process now instead of at the next request, because the RunPod worker
                # repeats this one in a moment.
                with suppress(EngineDead):
                    self.check_health()
            return serve_error

    return Replica


def warn_if_open() -> None:
    """Logs a warning if other machines can send requests to a server without API keys.

    `mixtral-serve run` also logs the warning before the load; `serve run` logs it only here.
    """
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    is_here = str(options.host).startswith(LOOPBACK)
    is_served = str(options.location).rpartition(".")[2] not in ("Disabled", "NoServer")
    if is_served and not is_here:
        log.warning(
            "Every machine that reaches %s:%d can send requests WITHOUT an API key. Set API_KEYS "
            "in the environment, or `http_options.host: 127.0.0.1` in the configuration.",
            options.host,
            options.port,
        )


@cache
def exit_soon() -> None:
    """Ends this process with code 1 after `EXIT_DELAY_S`, so that failed requests get their answer
    first. Only the first call has an effect."""
    threading.Timer(EXIT_DELAY_S, os._exit, (1,)).start()


def end_with_parent() -> None:
    """Ends this process with code 1 soon after its parent process has died."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def check_schema(path: str | Path) -> None:
    """Raises `ConfigError` if Serve refuses the YAML or would ignore some of its keys."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    first = serve_config.application(path)  # has a better message for a file that is no Serve YAML
    document: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{path}: `{key}`: {problem['msg']}.") from None
    for name in _unknown_keys(document, first):
        raise ConfigError(f"{path}: `{name}` is not a key of Serve's schema.")
    if (actual := first.get("import_path")) != IMPORT_PATH:
        raise ConfigError(f"{path}: `import_path` must be {IMPORT_PATH}, got {actual}.")
    for deployment in first.get("deployments") or []:
        if (actual := deployment.get("name")) != DEPLOYMENT:
            raise ConfigError(f"{path}: `deployments`: the only one is {DEPLOYMENT}, got {actual}.")


def _unknown_keys(document: dict[str, Any], application: dict[str, Any]) -> Iterator[str]:
    from ray.serve import schema

    levels = [
        ("", document, schema.ServeDeploySchema),
        ("http_options.", document.get("http_options"), schema.HTTPOptionsSchema),
        ("applications.0.", application, schema.ServeApplicationSchema),
    ]
    for i, deployment in enumerate(application.get("deployments") or []):
        where, actor = f"applications.0.deployments.{i}.", deployment.get("ray_actor_options")
        levels += [(where, deployment, schema.DeploymentSchema)]
        levels += [(f"{where}ray_actor_options.", actor, schema.RayActorOptionsSchema)]
    for where, mapping, model in levels:
        yield from (f"{where}{key}" for key in mapping or {} if key not in model.model_fields)
