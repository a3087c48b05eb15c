"""The rule by which the handle's router chooses a replica for a conversation."""

import random

import pytest

from serve_app.node import session_router
from serve_app.node.session_router import Conversations

REPLICAS = "abcd"


def idle(order: str = REPLICAS) -> dict[str, int]:
    """No requests, and the order of the hashes."""
    return dict.fromkeys(order, 0)


def test_a_new_conversation_goes_where_its_hash_says() -> None:
    """Among idle replicas the order of the hashes decides, with and without a conversation."""
    for session in ("one", None):
        assert Conversations[str]().ranked(session, idle("cabd")) == list("cabd")


def test_a_new_conversation_goes_to_a_replica_with_its_share_of_requests() -> None:
    """A replica with more than its share is asked after the others."""
    assert Conversations[str]().ranked("one", {"a": 3, "b": 1, "c": 2, "d": 2}) == list("bcda")


def test_a_conversation_stays_at_its_replica() -> None:
    """It stays where it went first, though its hash has another order, until that replica has too
    many requests; then it stays at the next one."""
    it = Conversations[str]()
    assert it.ranked("one", {**idle(), "a": 9})[0] == "b"
    assert it.ranked("one", idle())[0] == "b"
    assert it.ranked("one", {"a": 4, "b": 5, "c": 4, "d": 4})[0] == "b"
    assert it.ranked("one", {"a": 5, "b": 8, "c": 2, "d": 2})[0] == "c"
    assert it.ranked("one", idle())[0] == "c"


def test_a_conversation_of_a_lost_replica_is_new() -> None:
    """Its replica is no longer there: the hash decides."""
    it = Conversations[str]()
    it.ranked("one", idle("dabc"))
    assert it.ranked("one", idle("abc")) == list("abc")


def test_old_conversations_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has been silent for longest goes first."""
    monkeypatch.setattr(session_router, "NUM_KEPT", 2)
    it = Conversations[str]()
    for session in ("one", "two", "one", "three"):
        it.ranked(session, idle("dabc"))
    assert it.ranked("one", idle())[0] == "d"
    assert it.ranked("two", idle())[0] == "a"


def test_conversations_are_spread_equally() -> None:
    """Of 32 conversations that begin together, no replica has more than its share and one; their
    next requests go to the same replicas."""
    it, chance = Conversations[str](), random.Random(0)
    orders = {str(number): chance.sample(REPLICAS, 4) for number in range(32)}
    loads, first = idle(), {}
    for session, order in orders.items():
        first[session] = it.ranked(session, {each: loads[each] for each in order})[0]
        loads[first[session]] += 1
    assert max(loads.values()) <= 9
    for session, order in orders.items():
        loads[first[session]] -= 1
        assert it.ranked(session, {each: loads[each] for each in order})[0] == first[session]
        loads[first[session]] += 1
