"""JSON log lines from Ray's processes, which write text: `observability.log_format: json`.

Ray prints what its workers write on this process's streams, after a prefix. Here each such line
becomes a record of this process's log, unless it is one already: a replica writes JSON itself.
"""

import logging
import sys
from typing import Any

from serve_app.config.log_format import use_json

log = logging.getLogger(__name__)

RAYS_HANDLER = "ray_print_logs"
"""The name by which Ray registers, and at its end removes, what prints its workers' lines."""


def write_as_json() -> None:
    """Makes Ray's and Serve's loggers here, and what their workers write, lines of JSON."""
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    for name in ("ray", "ray.serve"):
        use_json(logging.getLogger(name).handlers)
    dispatcher.remove_handler(RAYS_HANDLER)
    dispatcher.add_handler(RAYS_HANDLER, write)


def write(batch: dict[str, Any]) -> None:
    """Writes the lines of one worker, as Ray delivers them: `lines`, `pid`, `actor_name`."""
    fields = {"process": batch.get("actor_name") or "ray", "pid": batch.get("pid")}
    for line in batch["lines"]:
        if line.startswith('{"time": "'):
            print(line, file=sys.stderr, flush=True)
        elif line.strip():
            log.info("%s", line, extra={"fields": fields})
