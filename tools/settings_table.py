"""`python -m tools.settings_table [FILE]` writes every setting as a row of a Markdown table.

The rows come from the settings' types, limits and docstrings. With FILE, the command replaces the
text between the two marks in it; docs/runpod.md has them, and a test compares the two.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from serve_app.config.environment import aliases
from serve_app.config.settings import EntrySettings, Settings
from serve_app.config.sources import PREFIX

BEGIN, END = "<!-- settings: python -m tools.settings_table -->", "<!-- /settings -->"


def table() -> str:
    """Returns the table, with one row for each setting: variables, values, default and meaning."""
    head = ["| variable | values | default | what it is |", "|---|---|---|---|"]
    return "\n".join([*head, *_rows()])


SET_BY_RUNPOD = ("runpod_webhook_get_job", "runpod_endpoint_id")
"""Variables that RunPod sets for its workers; users do not set them."""


def _rows() -> Iterator[str]:
    for name, field in EntrySettings.model_fields.items():
        if name not in SET_BY_RUNPOD:
            yield _row([name.upper()], field)
    for section, info in Settings.model_fields.items():
        kind: Any = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                path = f"{section}.{name}"
                names = [each for each, sets in aliases().items() if sets == path]
                yield _row([f"{PREFIX}{section}__{name}".upper(), *names], field)
        else:
            yield _row([f"{PREFIX}{section}".upper()], info)


def _row(names: list[str], field: FieldInfo) -> str:
    variables = "<br>".join(f"`{name}`" for name in names)
    default = "" if field.default is None else f"`{_text(field.default)}`"
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    meaning = re.sub(r"\bNone\b", "unset", meaning)
    return f"| {variables} | {values(field)} | {default} | {meaning} |"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def values(field: FieldInfo) -> str:
    """Returns the values that a variable takes: `whole number from 1`, `nf4, fp4, none`, `text`."""
    (kind,) = (kind for kind in _alternatives(field.annotation) if kind is not NoneType)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    names = {bool: "true, false", int: "whole number", float: "number", SecretStr: "secret"}
    limits = [
        f"{word} {limit:g}"
        for key, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
        for each in field.metadata
        if (limit := getattr(each, key, None)) is not None
    ]
    return " ".join([names.get(kind, "text"), *limits])


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def rewritten(text: str) -> str:
    """Returns `text` with a new table between the marks. Raises `ValueError` without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no {BEGIN} with {END} after it")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Prints the table, or writes it into FILE. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.settings_table")
    parser.add_argument("file", nargs="?", type=Path)
    options = parser.parse_args(arguments)
    if options.file is None:
        print(table())
    else:
        text = options.file.read_text(encoding="utf-8")
        options.file.write_text(rewritten(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
