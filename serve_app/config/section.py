"""The base class of all sections of the settings, and the form of lists in them."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


def items(text: str | None) -> list[str]:
    """Returns the items of a comma-separated list, without empty ones; `[]` for None."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]
