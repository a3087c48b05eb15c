"""RUNPOD_SERVERLESS=false: the same deployment over HTTP, from the same entry point.

For load-balancing endpoints, pods and any host. Unlike `serve run` it ends with exit code 0 when
it is told to stop.
"""

import logging
import signal
import threading

from serve_app.settings import ConfigError, EntrySettings, Settings
from serve_app.worker import cluster
from serve_app.worker.banner import banner
from serve_app.worker.start import num_slots

log = logging.getLogger(__name__)


def run(settings: Settings, entry: EntrySettings, checked: list[str]) -> int:
    """Serves on 0.0.0.0:PORT until SIGTERM or SIGINT; 0."""
    if entry.port_health == entry.port:
        raise ConfigError(
            f"PORT_HEALTH and PORT are both {entry.port}; the health listener needs its own port."
        )
    if entry.port_health is not None:
        log.warning("PORT_HEALTH is not served yet; /ping on PORT answers once the model is there.")
    for line in banner(settings, entry.serve_config, num_slots(settings), checked):
        log.info("%s", line)
    told_to_stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told_to_stop.set())
    try:
        cluster.serve_http(settings, entry.serve_config, entry.port)
        log.info("Serving HTTP on port %d.", entry.port)
        told_to_stop.wait()
    finally:
        cluster.stop()
    return 0
