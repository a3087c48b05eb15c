"""JSON that is encoded in pieces is the same JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.protocol import json_pieces, values

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)  # fmt: skip


@given(JSON, st.integers(0, 20))
def test_pieces_join_to_the_value(value: Any, large: int) -> None:
    """The pieces join to the value's JSON, for any limit of "large" and any depth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "LARGE", large)
        assert json.loads(json_pieces.encode(value)) == value


def test_half_a_character_is_no_json() -> None:
    """A lone surrogate is refused deep inside a large value too."""
    with pytest.raises(TypeError):
        json_pieces.encode({"choices": [["x" * values.LARGE], [{"text": "\ud83d"}]]})
