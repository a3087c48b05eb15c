"""The types of request fields."""

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticKnownError


def _whole(value: Any) -> Any:
    # JSON has one type of number, and some clients write integers as `16.0`.
    if isinstance(value, float):
        if value.is_integer():
            return int(value)
        if value - value != 0:  # an infinity or NaN
            raise PydanticKnownError("finite_number")
    return value


Integer = Annotated[int, BeforeValidator(_whole)]
"""The type of an integer field."""

Text = Annotated[str, StringConstraints(min_length=0)]
"""The type of a text field. Pydantic refuses lone surrogates only if it checks the length."""


def is_unicode(value: Any) -> bool:
    """Returns whether UTF-8 can encode all texts of a JSON value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unicode(value: Any) -> Any:
    if not is_unicode(value):
        raise PydanticKnownError("string_unicode")
    return value


JsonMap = Annotated[dict[str, Any], AfterValidator(_unicode)]
"""The type of a field with any JSON object, such as a JSON schema."""


class InnerObject(BaseModel):
    """An object inside a request. Unknown keys and wrong types are refused; null means absent."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: field for key, field in value.items() if field is not None}
