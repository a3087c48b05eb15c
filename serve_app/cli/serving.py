"""`mixtral-serve run`: serves a configuration over HTTP from this process.

Ray starts while the configuration is checked; a check that fails ends it again. The log has few
lines until the server is ready: what is served, who can reach it, and the long phases of the load.
"""

import logging
import sys
from pathlib import Path

import serve_app
from serve_app.cold_start import check as cold_start_check
from serve_app.cold_start.check import Checked
from serve_app.config import named
from serve_app.config.serve_config import http_options, port_setting
from serve_app.loading.load_log import PHASE_LINE
from serve_app.machine import processes
from serve_app.node import banner, fitness, http, ray_node

log = logging.getLogger(__name__)

SHORT_PHASE_S = 0.5
"""A load phase that takes fewer seconds has no line in the log; `/health` lists all phases."""


def run(config: str) -> int:
    """Serves `config`, a name or a path, until a signal stops it; the exit code.

    Raises `ConfigError` or `ServeError` where it cannot be served.
    """
    _log_to_terminal()
    path = named.find(config)
    endpoint = http.HttpEndpoint(http_options(path), port_name=port_setting(path))
    fitness.require_room_for_ray()
    processes.block_alarms()
    endpoint.proxy.prepare()
    log.info("mixtral-serve %s starts with %s; Ctrl-C stops it.", serve_app.__version__, path)
    try:
        checked = _checked_while_ray_starts(path)
        for line in checked.lines[1:]:  # the first one says that the file is valid
            log.info("%s", line)
        log.log(*banner.exposure(endpoint.http_options, checked.settings))
        return http.run(checked, path, endpoint)
    finally:
        ray_node.stop()
        endpoint.close()


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_has_no_short_phase)
    logging.basicConfig(
        level=logging.INFO,
        handlers=[handler],
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
    )


def _has_no_short_phase(record: logging.LogRecord) -> bool:
    match record.msg, record.args:
        case (str(line), (_, float(seconds))) if line == PHASE_LINE:
            return seconds >= SHORT_PHASE_S
    return True


def _checked_while_ray_starts(path: Path) -> Checked:
    checked: list[Checked] = []

    def check() -> None:
        checked.append(cold_start_check.check(path))
        problem = fitness.first_problem(fitness.checks(checked[0].settings, None))
        if problem is not None:
            raise problem

    with ray_node.signals_kept():
        ray_node.start(meanwhile=check)
    return checked[0]
