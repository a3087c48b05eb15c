"""JSON log lines from Ray's processes: `observability.log_format: json`.

Ray prints the output of its workers and the raylet's messages on this process's streams, with a
prefix. Here each such line becomes a record of this process's log. A replica's lines are JSON
already and are passed on. Serve's controller and proxies write text on standard error, whatever
their `logging_config` is; each record begins with its level.
"""

import logging
import re
import sys
from typing import Any

from serve_app.config.log_format import use_json

log = logging.getLogger(__name__)

RAYS_HANDLER = "ray_print_logs"
"""Ray's name of the handler that prints its workers' lines."""
_SERVES = re.compile(r"(WARNING|ERROR|CRITICAL) \d{4}-\d\d-\d\d ")
"""The beginning of a record of Serve above the level INFO."""


def write_as_json() -> None:
    """Makes the loggers of Ray and Serve in this process, and the output of Ray's workers, JSON."""
    from ray._private import worker
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    for name in ("ray", "ray.serve"):
        use_json(logging.getLogger(name).handlers)
    dispatcher.remove_handler(RAYS_HANDLER)
    dispatcher.add_handler(RAYS_HANDLER, write)
    # Ray calls it directly for messages of the raylet, such as the death of a worker.
    worker.print_to_stdstream = lambda batch, ignore_prefix: write(batch)


def write(batch: dict[str, Any]) -> None:
    """Writes the lines of one process, as Ray delivers them: `lines`, `pid`, `actor_name`."""
    fields = {"process": batch.get("actor_name") or "ray", "pid": batch.get("pid")}
    for line in batch["lines"]:
        if line.startswith('{"time": "'):
            print(line, file=sys.stderr, flush=True)
        elif line.strip():
            found = _SERVES.match(line)
            level = logging.getLevelNamesMapping()[found[1]] if found else logging.INFO
            log.log(level, "%s", line, extra={"fields": fields})
