"""Opens a listening TCP socket, or raises an error that says why the port cannot be used."""

import contextlib
import errno
import random
import socket
from pathlib import Path

import psutil

from serve_app.config.serve_config import ConfigError

LOOPBACK = ("127.", "localhost", "::1")
"""Prefixes of the addresses that only this machine can reach."""
FREE_PORTS = range(20_000, 30_000)
"""Ports that no other program should take before their server listens: Ray's workers use lower
ports, and Linux gives outgoing connections ports from 32,768 on
(`net.ipv4.ip_local_port_range`)."""
NUM_TRIES = 100
"""Number of random ports that `free_port` tries."""


def listen(name: str, port: int, host: str = "0.0.0.0") -> socket.socket:
    """Returns a socket that listens on `host`:`port`.

    Raises a `ConfigError` that names setting `name`.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{name}: port {port} of {host} is in use; end the process that listens there, or "
                "choose another port."
            ) from None
        # Python appends the address to the system's words.
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise ConfigError(
            f"{name}: nothing can listen on port {port} of {host} ({reason}); choose another one."
        ) from None


def require_free(name: str, port: int, host: str) -> None:
    """Raises a `ConfigError` that names setting `name` if `host`:`port` cannot be used."""
    listen(name, port, host).close()


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port of `host` on which no process listens now, of `FREE_PORTS` if one is
    free."""
    for port in random.SystemRandom().sample(FREE_PORTS, NUM_TRIES):
        with contextlib.suppress(ConfigError), listen("port", port, host):
            return port
    with listen("port", 0, host) as free:
        return int(free.getsockname()[1])


def has_unsent(port: int) -> bool:
    """Returns whether a connection to the local TCP `port` has bytes that its client has not
    received.

    Reads /proc/net/tcp, whose columns proc(5) describes: local address, remote address, state, and
    the number of bytes that wait to be sent.
    """
    for table in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", table).read_text().splitlines()[1:]
        except FileNotFoundError:  # no IPv6
            continue
        for line in lines:
            _, local, _, _, queues, *_ = line.split()
            if int(local.rpartition(":")[2], 16) == port and int(queues.partition(":")[0], 16):
                return True
    return False


def listen_before(port: int) -> list[socket.socket]:
    """Returns sockets that get all connections to `port` instead of a server on 0.0.0.0:`port`.

    Linux prefers a socket on a connection's own address to one on every address. So there is one
    socket for each IPv4 address of this machine. The server must set SO_REUSEPORT too.
    """
    addresses = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET
    }
    sockets: list[socket.socket] = []
    for address in sorted(addresses):
        try:
            sockets.append(socket.create_server((address, port), reuse_port=True))
        except OSError as error:  # an address that has just gone
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return sockets
