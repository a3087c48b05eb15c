"""Opens a listening TCP socket, or says in one sentence why a port cannot be used."""

import errno
import socket

from serve_app.config.serve_config import ConfigError


def listen(name: str, port: int, host: str = "0.0.0.0") -> socket.socket:
    """A socket that listens on `host`:`port`; raises a `ConfigError` that names setting `name`."""
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
    """Raises a `ConfigError` that names setting `name` where `host`:`port` cannot be used."""
    listen(name, port, host).close()
