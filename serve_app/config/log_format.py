"""The format of log lines: text, or one JSON object a line (`observability.log_format`).

    {"time": "2026-11-29T08:15:02.123+00:00", "level": "INFO", "logger": "serve_app.node.phases",
     "message": "Cold start: read 41.2 s", "phase": "read", "seconds": 41.2}

A record's fields, such as `request_id`, are the dict `fields` in its `extra`. A replica's records
also have Serve's fields. docs/observability.md lists all fields.
"""

import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve_app.config.settings import ConfigError, Settings

SERVES_FIELDS = ("request_id", "application", "deployment", "replica", "route")
"""Attributes that Serve adds to the records of a replica."""


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.line(record), default=str)

    def line(self, record: logging.LogRecord) -> dict[str, Any]:
        """Returns the object: time (RFC 3339, UTC), level, logger, message, then the record's
        fields."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Serve's `request_id` may differ from ours, so the record's own fields come last.
        line |= {name: getattr(record, name) for name in SERVES_FIELDS if hasattr(record, name)}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return line


def use_json(handlers: Iterable[logging.Handler]) -> None:
    """Makes `handlers`, and the targets of those that are a `MemoryHandler`, write JSON."""
    for handler in handlers:
        target = getattr(handler, "target", None)  # a MemoryHandler passes records on
        (target or handler).setFormatter(JsonFormatter())


def is_json() -> bool:
    """Returns whether the log of this process is JSON."""
    handlers = logging.getLogger().handlers
    return any(isinstance(handler.formatter, JsonFormatter) for handler in handlers)


def use_log_format(config: str | Path) -> None:
    """Makes this process log in the format of the file `config` and the environment.

    Has no effect if the configuration contains an error; the check of the start reports it as text.
    """
    try:
        settings = Settings.from_yaml(config)
    except ConfigError:
        return
    if settings.observability.is_json:
        use_json(logging.getLogger().handlers)
