"""`docs/fields.md` lists what the code ignores."""

import re
from pathlib import Path

import pytest

from serve_app.protocol import unsupported
from serve_app.protocol.messages_api import unsupported as messages
from serve_app.protocol.responses_api import unsupported as responses

PAGE = Path("docs/fields.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """Returns the text below the heading that begins with `title`."""
    return re.split(rf"^## {title}", PAGE, flags=re.MULTILINE)[1].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("Chat completions", unsupported.IGNORED),
        ("Responses", responses.IGNORED | responses.UNSUPPORTED.keys()),
        ("Messages", messages.IGNORED | messages.UNSUPPORTED.keys()),
    ],
)
def test_every_field_without_effect_is_listed(title: str, names: frozenset[str]) -> None:
    """The section of the API names the field, and the table has no other."""
    rows = [row for row in section(title).splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([a-z_.]+)`", row.split("|")[1])}
    assert {name.partition(".")[0] for name in listed} >= names
