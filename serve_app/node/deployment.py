"""The deployment in Ray Serve: starts it, counts its replicas, finds the cause of a failed load."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_app.cold_start.killed import MemoryBefore
from serve_app.config.serve_config import may_be_several, unused_keys
from serve_app.config.settings import ConfigError, Settings, application
from serve_app.errors import ModelLoadFailed
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Failed, Phase, Running, Started, read_events
from serve_app.node import phases, ray_node, ready_replicas
from serve_app.node.session_router import ROUTER
from serve_app.start_plan.plan import StartPlan

log = logging.getLogger(__name__)

APP_NAME = "mixtral"
"""Name of the application in Serve."""


def deploy(
    settings: Settings,
    config: str | Path,
    route_prefix: str | None,
    plan: StartPlan | None,
    on_first: Callable[[], None] = lambda: None,
) -> Any:
    """Deploys the application of `config` and waits until its model is loaded. Returns its handle.

    Without a `route_prefix` only the handle accepts requests, and it chooses among several replicas
    by conversation. Raises `ModelLoadFailed` with the cause that the replica wrote into the load
    log.
    """
    import ray
    from ray import serve

    from serve_app import app

    log_unused_keys(config)
    is_routed = route_prefix is None and may_be_several(config)
    routed = {"request_router_config": ROUTER} if is_routed else {}
    bound = _overridden(app.application(settings, plan=plan), application(config), **routed)
    require_resources(bound._bound_deployment, ray.cluster_resources())
    memory = MemoryBefore()
    LoadLog(settings.load_log).start(Phase.REPLICA)  # the replica ends this phase
    try:
        with (
            phases.logged(settings.load_log),
            ready_replicas.logged(num_running, bound._bound_deployment.num_replicas or 1, on_first),
        ):
            return serve.run(
                bound,
                name=APP_NAME,
                route_prefix=route_prefix,
                logging_config=ray_node.SERVE_LOGGING,
            )
    except RuntimeError as error:
        log.debug("Serve says: %s", error)
        serve.delete(APP_NAME)
        raise _load_failure(settings, plan, memory) from None


def handle() -> Any:
    """Returns the handle of the deployment, of which some replicas may still load."""
    from ray import serve

    return serve.get_app_handle(APP_NAME)


def log_unused_keys(config: str | Path) -> None:
    """Logs the keys of the YAML that have no effect here."""
    if unused := unused_keys(config):
        log.warning("Ignored: %s; only `serve run` uses them.", ", ".join(unused))


def _overridden(app: Any, config: dict[str, Any], **options: Any) -> Any:
    """Returns `app` with `options` of the deployment, which the YAML's `deployments:` override."""
    from ray.serve import Application

    deployment = app._bound_deployment
    for override in config.get("deployments") or []:
        if override.get("name") != deployment.name:
            raise ConfigError(f"`deployments`: there is no deployment {override.get('name')!r}.")
        options |= {key: value for key, value in override.items() if key != "name"}
    try:
        return Application(deployment.options(**options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"`deployments`: {error}") from None


def require_resources(deployment: Any, available: dict[str, float]) -> None:
    """Raises `ModelLoadFailed` if the replicas need more resources than Ray has, because Serve
    would wait without end."""
    options = deployment.ray_actor_options
    for kind, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        # "auto" and autoscaling start with one.
        needed = (options.get(key) or 0) * (deployment.num_replicas or 1)
        has = available.get(kind, 0)
        if needed > has:
            raise ModelLoadFailed(
                f"The deployment needs {needed:g} {kind}s, but Ray finds {has:g} on this machine; "
                f"change `{key}` or `num_replicas` under `deployments:`, or `model.device`."
            )


def is_running() -> bool:
    """Returns whether Serve has a replica that passes its health checks. Sends the replica no
    request."""
    return num_running() > 0


def num_running() -> int:
    """Returns the number of replicas that pass Serve's health checks. Sends them no request."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return 0
    applications = serve.status().applications
    deployments = applications[APP_NAME].deployments if APP_NAME in applications else {}
    return sum(deployment.replica_states.get("RUNNING", 0) for deployment in deployments.values())


def require_no_failure(load_log: str) -> None:
    """Raises the `ModelLoadFailed` that the replica wrote into `load_log`, if any."""
    for event in read_events(load_log):
        if isinstance(event, Failed):
            raise ModelLoadFailed(event.error, retry=event.retry)


def _load_failure(
    settings: Settings, plan: StartPlan | None, memory: MemoryBefore
) -> ModelLoadFailed:
    events = read_events(settings.load_log) if settings.load_log is not None else []
    for event in events:
        if isinstance(event, Failed):
            return ModelLoadFailed(event.error, retry=event.retry)
    if events and isinstance(last := events[-1], Started | Running):
        return memory.killed(plan, last.phase)
    return ModelLoadFailed(
        "The model could not be loaded; the cause is in the worker's log.", retry=True
    )
