"""The kernel's information about TCP ports."""

import socket

from serve_app.machine.ports import free_port, has_unsent


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
