"""`mixtral-serve run`: serves a configuration over HTTP from this process.

Ray starts while the configuration is checked, and is stopped if the check fails. Until the server
is ready, the log shows only the model, the clients that can reach the server, and the long phases
of the load.
"""

import logging
from pathlib import Path

import serve_app
from serve_app.cli.terminal_log import log_to_terminal
from serve_app.cold_start import check as cold_start_check
from serve_app.cold_start.check import Checked
from serve_app.config import named
from serve_app.config.log_format import use_log_format
from serve_app.config.serve_config import http_options, port_setting
from serve_app.machine import processes
from serve_app.node import banner, fitness, http, ray_node
from serve_app.node.http_endpoint import HttpEndpoint

log = logging.getLogger(__name__)


def run(config: str) -> int:
    """Serves `config`, a name or a path, until a signal stops it. Returns the exit code.

    Raises `ConfigError` or `ServeError` if it cannot be served.
    """
    log_to_terminal()
    path = named.find(config)
    use_log_format(path)
    endpoint = HttpEndpoint(http_options(path), port_name=port_setting(path))
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
