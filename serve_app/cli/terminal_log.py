"""The log of commands that load the model in a terminal."""

import logging
import sys

from serve_app.loading.load_log import PHASE_LINE

SHORT_PHASE_S = 0.5
"""Shorter load phases are not logged; `/health` lists all phases."""


def log_to_terminal() -> None:
    """Writes the log of this process to standard error, without short load phases."""
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
