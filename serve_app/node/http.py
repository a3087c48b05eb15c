"""Serves the deployment over HTTP until this process is stopped.

Both `mixtral-serve run` and `runpod_entry.py` with RUNPOD_SERVERLESS=false call `run`. After
SIGTERM or Ctrl-C, running requests finish and the exit code is 0; it is 1 if the model dies and
cannot be loaded again. `/ping` has an answer from the beginning, before Ray starts: on PORT_HEALTH,
or on the server's own port, which Serve's proxy takes over when the first replica is ready.
"""

import json
import logging
from pathlib import Path

from serve_app.cold_start.check import Checked
from serve_app.cold_start.cold_start import ColdStart
from serve_app.config.settings import Settings
from serve_app.errors import ServeError
from serve_app.node import cluster, deployment, ray_node
from serve_app.node.drain import drain
from serve_app.node.http_endpoint import HttpEndpoint

log = logging.getLogger(__name__)


def run(checked: Checked, config: str | Path, endpoint: HttpEndpoint) -> int:
    """Serves `config` until SIGTERM or Ctrl-C, then finishes running requests. Returns exit code
    0."""
    settings = cluster.with_load_log(checked.settings)
    endpoint.allowed_origins = settings.api.allowed_origins
    endpoint.tell(load_log=settings.load_log)
    try:
        try:
            with ColdStart(settings, checked.plan).watch():
                handle = cluster.serve_http(
                    settings, config, endpoint.proxy, checked.plan, endpoint.serves
                )
            endpoint.is_deployed = True
        except SystemExit:
            if endpoint.is_serving:
                drain(deployment.handle(), settings.runpod.drain_s, endpoint.http_options["port"])
            raise
        endpoint.serves()
        log.info("Serving HTTP on %s; try: %s", endpoint.url, example(endpoint.url, settings))
        endpoint.watch()
        drain(handle, settings.runpod.drain_s, endpoint.http_options["port"])
    except ServeError:
        endpoint.tell("failed")
        raise
    finally:
        ray_node.stop()
        endpoint.close()
    return 0


def example(url: str, settings: Settings) -> str:
    """Returns a command for a shell on this machine that asks the server at `url`."""
    insecure = "-k " if url.startswith("https:") else ""  # the certificate names the public host
    key = "-H 'Authorization: Bearer KEY' " if settings.api.needs_key else ""
    body = json.dumps({"prompt": "What is the capital of France?"})
    return f"curl {insecure}{key}{url}/prompt -d '{body}'"
