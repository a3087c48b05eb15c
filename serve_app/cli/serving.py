"""`mixtral-serve run`: checks a configuration, then serves it over HTTP from this process."""

import logging
import sys

from serve_app.cold_start.check import check
from serve_app.config import named
from serve_app.config.serve_config import http_options
from serve_app.node import fitness, http


def run(config: str) -> int:
    """Serves `config`, a name or a path, until a signal stops it; the exit code.

    Raises `ConfigError` or `ServeError` where it cannot be served.
    """
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    path = named.find(config)
    checked = check(path)
    endpoint = http.HttpEndpoint(http_options(path), port_name=f"{path}: `http_options.port`")
    if (problem := fitness.first_problem(fitness.checks(checked.settings, None))) is not None:
        raise problem
    return http.run(checked, path, endpoint)
