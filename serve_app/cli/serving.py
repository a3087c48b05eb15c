"""`mixtral-serve run`: serves a configuration over HTTP from this process.

Ray starts while the configuration is checked; a check that fails ends it again.
"""

import logging
import sys
from pathlib import Path

from serve_app.cold_start import check as cold_start_check
from serve_app.cold_start.check import Checked
from serve_app.config import named
from serve_app.config.serve_config import http_options
from serve_app.node import fitness, http, ray_node


def run(config: str) -> int:
    """Serves `config`, a name or a path, until a signal stops it; the exit code.

    Raises `ConfigError` or `ServeError` where it cannot be served.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    path = named.find(config)
    endpoint = http.HttpEndpoint(http_options(path), port_name=f"{path}: `http_options.port`")
    fitness.require_room_for_ray()
    try:
        return http.run(_checked_while_ray_starts(path), path, endpoint)
    finally:
        ray_node.stop()


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
