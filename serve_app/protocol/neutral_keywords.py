"""Removes keywords from a JSON schema that restrict no value, and that llguidance refuses."""

from typing import Any

from serve_app.protocol.schema_tree import mapped

FORMATS = {
    *("date-time", "date", "time", "duration", "email", "idn-email", "hostname", "idn-hostname"),
    *("ipv4", "ipv6", "uri", "uri-reference", "iri", "iri-reference", "uuid", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
}
"""The formats of https://json-schema.org/draft/2020-12/json-schema-validation, 7.3. Any other
format, such as pydantic's `path` and `password`, does not restrict values (7.2.3)."""


def without_neutral(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns `schema` without `uniqueItems: false` and formats that JSON schema does not
    define."""
    new: dict[str, Any] = mapped(schema, _restricting)
    return new


def _restricting(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if not _is_neutral(key, value)}


def _is_neutral(key: str, value: Any) -> bool:
    if key == "uniqueItems":
        return value is False
    return key == "format" and isinstance(value, str) and value not in FORMATS
