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

from serve_app.config.serve_config import may_be_several
from serve_app.config.settings import ConfigError, Settings
from serve_app.errors import EngineDead, ModelLoadFailed
from serve_app.loading.load_log import LoadLog
from serve_app.loading.phases import Phase
from serve_app.machine import own_folder, processes
from serve_app.node import deployment, ray_node, ray_processes, ray_thread, worker_lines
from serve_app.node.client import DeploymentClient, Forward
from serve_app.node.haproxy import Proxy
from serve_app.start_plan.plan import StartPlan

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

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
        arguments = (self._settings, self._config, None, self._plan)
        with ray_node.signals_kept():
            try:
                handle = await self._unless_dead(ray_thread.run(deployment.deploy, *arguments))
            except ConfigError as error:
                raise ModelLoadFailed(str(error)) from None
        title = f"ServeReplica:{deployment.APP_NAME}"
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
        return deployment.deploy(settings, config, "/", plan, on_first)


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
