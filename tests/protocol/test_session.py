"""The replica of a conversation: the hash of the text that stays the same."""

import pytest

from serve_app.protocol.call import Call
from serve_app.protocol.session import session_of
from tests.node.test_haproxy_sessions import KINDS, turns


def of(body: object, session_id: str | None = None) -> str | None:
    return session_of(Call("POST", "/prompt", body, "", session_id=session_id))


@pytest.mark.parametrize("kind", KINDS)
def test_the_turns_of_a_conversation_have_one_hash(kind: str) -> None:
    """Bodies for which HAProxy finds one replica have one hash, and other conversations another."""
    found = [{of(body) for body in turns(kind, number)} for number in range(12)]
    assert all(len(each) == 1 for each in found)
    assert len(set.union(*found)) == 12
    assert None not in set.union(*found)


@pytest.mark.parametrize(
    "body", [None, [], "text", {}, {"prompt": [1, 2]}, {"messages": 3}, {"prompts": ["a", "b"]}]
)
def test_a_body_without_such_a_text_has_none(body: object) -> None:
    """Token ids, lists of prompts and broken bodies go to any replica."""
    assert of(body) is None


def test_any_text_has_a_hash() -> None:
    """Half a character, which JSON may hold, is no error."""
    assert of({"prompt": "\ud83d"}) != of({"prompt": "?"})


def test_the_header_goes_before_the_body() -> None:
    """A job's `x-session-id` decides, whatever the body says."""
    assert of({"prompt": "a"}, "one") == of({"prompt": "b"}, "one") != of({"prompt": "a"}, "two")
