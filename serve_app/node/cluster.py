"""Cluster: starts the deployment on this machine's Ray, watches it, and stops it.

`Cluster` has no HTTP proxy: it calls the deployment through a handle. `serve_http` starts the same
deployment behind Serve's proxy. Both read the same file as `serve run`.
"""

import asyncio
import atexit
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.cold_start.killed import MemoryBefore
from serve_app.config.serve_config import may_be_several, unused_keys
from serve_app.config.settings import ConfigError, Settings, application
from serve_app.errors import EngineDead, ModelLoadFailed
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Failed, Phase, Running, Started, read_events
from serve_app.machine import own_folder, processes
from serve_app.node import (
    phases,
    ray_node,
    ray_processes,
    ray_thread,
    ready_replicas,
    worker_lines,
)
from serve_app.node.client import DeploymentClient, Forward
from serve_app.node.haproxy import Proxy
from serve_app.node.session_router import ROUTER
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

APP_NAME = "mixtral"
LIVENESS_POLL_S = 0.5
"""Seconds between two checks whether all processes are alive."""
HANG_S = 5.0
"""Maximum seconds to wait for a running call of Ray's API after Ray has died."""
STOP_S = 30.0
"""Maximum seconds for the remaining processes of a dead Ray to end."""


class Cluster:
    """One deployment that is called through a handle, and that can be started again."""

    def __init__(
        self,
        settings: Settings,
        config: str | Path,
        plan: StartPlan | None,
        process_s: float | None,
    ) -> None:
        """`process_s` is the time in seconds that this process took to start, for the load log;
        None: the age of the process when `start` is called.

        Without a `plan` the replica makes one.
        """
        self._settings = with_load_log(settings)
        self._config = config
        self._plan = plan
        self._process_s = process_s
        self._client: DeploymentClient | None = None
        self._vital: dict[str, psutil.Process] = {}

    async def start(self) -> Forward:
        """Starts Ray, Serve and the deployment. Returns when the model is loaded.

        Raises `ModelLoadFailed`, or `EngineDead` if Ray dies meanwhile. Blocking calls run in a
        thread, so that the event loop stays free.
        """
        load_log = _begin(self._settings, self._process_s)
        # Ray replaces the process's signal handlers. They are restored after each call, so that
        # SIGTERM reaches the SDK, which lets running jobs finish.
        with load_log.phase(Phase.RAY):
            for step in (ray_node.start, ray_node.start_serve):
                with ray_node.signals_kept():
                    await ray_thread.run(step)
        _use_log_format(self._settings)
        self._vital = ray_processes.vital()
        with ray_node.signals_kept():
            try:
                handle = await self._unless_dead(
                    ray_thread.run(deploy, self._settings, self._config, None, self._plan)
                )
            except ConfigError as error:
                raise ModelLoadFailed(str(error)) from None
        title = f"ServeReplica:{APP_NAME}"
        replicas = [
            process for process in ray_processes.below() if title in processes.command(process)
        ]
        # If there are several replicas, the others answer while Serve replaces one.
        if len(replicas) == 1 and not may_be_several(self._config):
            self._vital["the model's process"] = replicas[0]
        self._client = DeploymentClient(handle, self._settings.api.request_timeout_s)
        return self._client

    async def watch(self) -> str:
        """Returns the name of the first process to die that the deployment needs."""
        while True:
            for name, process in self._vital.items():
                if not processes.is_alive(process):
                    return name
            await asyncio.sleep(LIVENESS_POLL_S)

    async def stop(self) -> None:
        """Ends running calls, and kills the remaining processes of Ray."""
        if self._client is not None:
            self._client.close()
        async with asyncio.timeout(STOP_S):
            await ray_thread.run(ray_node.kill)

    async def _unless_dead(self, step: asyncio.Future[Any]) -> Any:
        """Returns the result of `step`. Raises `EngineDead` if Ray dies before there is one."""
        watching = asyncio.create_task(self.watch())
        try:
            await asyncio.wait({step, watching}, return_when=asyncio.FIRST_COMPLETED)
            if step.done():
                return step.result()
            await asyncio.to_thread(processes.kill, ray_processes.below)
            await asyncio.wait({step}, timeout=HANG_S)
            if step.done():
                step.exception()  # Ray's own report of the same death
            else:
                ray_thread.leave()
            raise EngineDead(f"{watching.result()} ended while the model was loading.")
        finally:
            watching.cancel()


def serve_http(
    settings: Settings,
    config: str | Path,
    proxy: Proxy,
    plan: StartPlan,
    on_first: Callable[[], None],
) -> Any:
    """Starts the deployment behind `proxy`, which is prepared. Returns the deployment's handle.

    If there are several replicas, calls `on_first` in a thread when the first one is ready.
    """
    if proxy.obstacle is not None:
        note = f"Serve's own proxy receives the requests, not HAProxy: {proxy.obstacle}"
        log.warning("%s.", note)
        plan = replace(plan, notes=(*plan.notes, note))
    load_log = _begin(settings, None)
    with load_log.phase(Phase.RAY):
        with ray_node.signals_kept():
            ray_node.start()
        _use_log_format(settings)
        # From here on the caller handles signals: the model may take minutes to load.
        with ray_node.signals_kept():
            ray_node.start_serve(proxy.options(settings.api))
    with ray_node.signals_kept():
        return deploy(settings, config, "/", plan, on_first)


def _use_log_format(settings: Settings) -> None:
    if settings.observability.is_json:
        worker_lines.write_as_json()


def _begin(settings: Settings, process_s: float | None) -> LoadLog:
    load_log = LoadLog(settings.load_log)
    load_log.clear()
    load_log.done(Phase.PROCESS, processes.own_age_s() if process_s is None else process_s)
    return load_log


def with_load_log(settings: Settings) -> Settings:
    """Returns `settings` with a load log, a file on the local disk until this process ends."""
    if settings.load_log is not None:
        return settings
    folder = own_folder.create("mixtral-load-")
    atexit.register(own_folder.remove, folder)
    return settings.model_copy(update={"load_log": str(folder / "load.jsonl")})


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
