"""The question, the typed answer and the tool that all clients share.

The fields have few values, because a small model would not end a longer text by itself.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

TEXT = "What is the weather in Paris?"
QUESTION: Any = [{"role": "user", "content": TEXT}]


class Weather(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Paris", "London"]
    days: int = Field(ge=1, le=7)


SCHEMA: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "London"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION: Any = {
    "name": "get_weather",
    "description": "Gives the weather of a city.",
    "parameters": SCHEMA,
}
TOOL: Any = {"type": "function", "function": FUNCTION}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def get_weather(city: Literal["Paris", "London"], days: Literal[1, 2, 3]) -> str:
    """Gives the weather of a city.

    Args:
        city: The city.
        days: For how many days.
    """
    return f"{city}: sun for {days} days."


def valid(arguments: str | dict[str, Any]) -> Weather:
    """Returns the arguments of a call. Raises an error if they do not match the schema."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    return Weather.model_validate(value, strict=True)
