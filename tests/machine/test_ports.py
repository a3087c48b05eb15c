"""The kernel's information about TCP ports."""

import socket
from pathlib import Path

import pytest

from serve_app.machine import ports
from serve_app.machine.ports import FREE_PORTS, free_port, has_unsent


def test_a_free_port_is_never_one_of_an_outgoing_connection() -> None:
    """Linux may give a connection any port of its own range, also one that was free a moment
    ago."""
    first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    found = {free_port() for _ in range(50)}
    assert len(found) > 40
    assert found <= set(FREE_PORTS)
    assert not found & set(range(int(first), int(last) + 1))


def test_a_used_port_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ports the one on which a process listens is left out; without a free one, Linux
    chooses."""
    used = free_port()
    with socket.create_server(("127.0.0.1", used)):
        monkeypatch.setattr(ports, "FREE_PORTS", range(used, used + 1))
        monkeypatch.setattr(ports, "NUM_TRIES", 1)
        assert free_port() != used


def test_bytes_that_a_client_does_not_read_are_seen() -> None:
    """A full socket has unsent bytes until its client has read them; an idle one has none."""
    port = free_port()
    with (
        socket.create_server(("127.0.0.1", port)) as server,
        socket.create_connection(("127.0.0.1", port)) as client,
    ):
        connection, _ = server.accept()
        with connection:
            assert not has_unsent(port)
            connection.setblocking(False)
            num_sent = 0
            try:
                while True:
                    num_sent += connection.send(b"x" * 65_536)
            except BlockingIOError:
                pass
            assert has_unsent(port)
            assert not has_unsent(client.getsockname()[1])
            while num_sent:
                num_sent -= len(client.recv(1_000_000))
            assert not has_unsent(port)
