"""Finds the environment variable that sets a setting, for error messages."""

import re
from collections.abc import Mapping

from serve_app.config import environment as names
from serve_app.config.sections import SECTIONS

PREFIX = "MIXTRAL_"


def variable(path: str) -> str:
    """Returns our own variable for a setting, such as `MIXTRAL_API__KEYS` for `api.keys`."""
    return PREFIX + path.replace(".", "__").upper()


def source(environment: Mapping[str, str], path: str) -> str | None:
    """Returns the variable that gives the setting `path` its value; None for the YAML or the
    default."""
    for name, value in environment.items():
        if value and name.upper() == variable(path):
            return name
    return names.alias_source(environment, path)


def set_in(environment: Mapping[str, str], section: str) -> str:
    """Returns the variables that set fields of `section`, as the end of a sentence; "" for none."""
    fields = SECTIONS[section].model_fields if section in SECTIONS else {}
    variables = [name for field in fields if (name := source(environment, f"{section}.{field}"))]
    return f"; the environment sets {', '.join(variables)}" if variables else ""


def with_variables(environment: Mapping[str, str], message: str) -> str:
    """Returns `message` with the variable after each `section.field` that a variable sets."""

    def named(match: re.Match[str]) -> str:
        variable_name = source(environment, match[1])
        return f"{match[0]} (set by {variable_name})" if variable_name else match[0]

    return re.sub(r"`([a-z]+\.[a-z_]+)`", named, message)
