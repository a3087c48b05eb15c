"""`python -m tools.settings_table [FILE]`: every setting as a row of a Markdown table.

Made from the settings' own types, limits and docstrings. With FILE, the part of it between the
two marks is replaced: that is how docs/runpod.md is kept, and a test holds that it was.
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

from serve_app.config.environment import FAMILIAR
from serve_app.config.settings import PREFIX, EntrySettings, Settings

BEGIN, END = "<!-- settings: python -m tools.settings_table -->", "<!-- /settings -->"


def table() -> str:
    """One row for each variable: its names, its values, its default, and what it is."""
    head = ["| variable | values | default | what it is |", "|---|---|---|---|"]
    return "\n".join([*head, *_rows()])


OF_THE_PLATFORM = ("runpod_webhook_get_job",)
"""Set by RunPod itself, never by hand."""


def _rows() -> Iterator[str]:
    for name, field in EntrySettings.model_fields.items():
        if name not in OF_THE_PLATFORM:
            yield _row([name.upper()], field)
    for section, info in Settings.model_fields.items():
        kind: Any = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                other = [known for known, path in FAMILIAR.items() if path == f"{section}.{name}"]
                yield _row([f"{PREFIX}{section}__{name}".upper(), *other], field)
        else:
            yield _row([f"{PREFIX}{section}".upper()], info)


def _row(names: list[str], field: FieldInfo) -> str:
    variables = "<br>".join(f"`{name}`" for name in names)
    default = "" if field.default is None else f"`{_text(field.default)}`"
    told = " ".join((field.description or "").split()).replace("|", "\\|")
    told = re.sub(r"\bNone\b", "unset", told)
    return f"| {variables} | {values(field)} | {default} | {told} |"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def values(field: FieldInfo) -> str:
    """What may be written into the variable, in words: `1 to 8`, `nf4, fp4, none`, `text`."""
    (kind,) = (kind for kind in _alternatives(field.annotation) if kind is not NoneType)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    names = {bool: "true, false", int: "whole number", float: "number", SecretStr: "secret"}
    told = [
        f"{word} {limit:g}"
        for key, word in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
        for each in field.metadata
        if (limit := getattr(each, key, None)) is not None
    ]
    return " ".join([names.get(kind, "text"), *told])


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    is_union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if is_union else (annotation,)


def rewritten(text: str) -> str:
    """`text` with the table between its marks made anew; raises `ValueError` without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"there is no {BEGIN} with {END} after it")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """The command: prints the table, or writes it into FILE."""
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
