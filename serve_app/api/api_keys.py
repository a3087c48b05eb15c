"""ApiKeys: the API keys that a server accepts, and the account of each.

Keys come from `api.keys`, and from the file `api.keys_file`, which is read again when it changes.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from serve_app.config.api_settings import ApiSettings
from serve_app.config.key_file import FIXED_PREFIX, ApiKey, read_keys, sha256
from serve_app.config.serve_config import ConfigError
from serve_app.errors import InvalidApiKey
from serve_app.protocol.key_account import KeyAccount

log = logging.getLogger(__name__)

POLL_S = 1.0
"""Seconds between two checks of the file for changes."""


class ApiKeys:
    """The keys of one server."""

    def __init__(self, settings: ApiSettings) -> None:
        """Reads the file. Raises `ConfigError` if it cannot be read."""
        self.are_needed = settings.needs_key
        self._fixed = [
            ApiKey(name=f"{FIXED_PREFIX}{number}", sha256=sha256(key), created=0)
            for number, key in enumerate(settings.fixed_keys, 1)
        ]
        self._accounts: dict[str, KeyAccount] = {}
        self._path = None if settings.keys_file is None else Path(settings.keys_file).expanduser()
        self._version: object = None
        self._is_closed = threading.Event()
        if self._path is None:
            self._take(self._fixed)
            return
        self._version = self._current_version()
        self._take([*self._fixed, *read_keys(self._path)])
        threading.Thread(target=self._follow, name="api keys", daemon=True).start()

    def find(self, key: str) -> KeyAccount | None:
        """Returns the account of `key`; None if the server does not accept it.

        The key is looked up by its hash, so the time of this call reveals nothing about valid keys.
        """
        return self._accounts.get(sha256(key))

    def account_of(self, headers: Mapping[str, str]) -> KeyAccount:
        """Returns the account of a request's key.

        The key is a bearer token or, from Anthropic's clients, `x-api-key`; if a request has both,
        the bearer token counts. `headers` must ignore the case of names. Raises `InvalidApiKey` if
        the key is missing or not accepted.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        # Header values are decoded as Latin-1; a key in the environment is UTF-8.
        key = key.strip().encode("latin-1").decode(errors="surrogateescape")
        if (account := self.find(key)) is None:
            raise InvalidApiKey(
                "Send a valid API key as `Authorization: Bearer <key>` or `x-api-key: <key>`."
            )
        return account

    @property
    def accounts(self) -> list[KeyAccount]:
        """The accounts of all keys."""
        return list(self._accounts.values())

    def close(self) -> None:
        """Ends the thread that follows the file."""
        self._is_closed.set()

    def _take(self, keys: Iterable[ApiKey]) -> None:
        keys = list(keys)
        old_accounts = {account.key.name: account for account in self._accounts.values()}
        accounts = {}
        for key in keys:
            account = old_accounts.get(key.name)
            if account is None:
                account = KeyAccount(key, is_alone=len(keys) == 1)
            else:
                account.update(key, is_alone=len(keys) == 1)
            accounts[key.sha256] = account
        self._accounts = accounts  # one assignment, because other threads read the dict

    def _follow(self) -> None:
        """Reads the file again after each change.

        Polls the file, because inotify does not report changes by another machine.
        """
        assert self._path is not None
        while not self._is_closed.wait(POLL_S):
            if (version := self._current_version()) == self._version:
                continue
            try:
                keys = read_keys(self._path)
            except ConfigError as error:
                log.error("The API keys are unchanged, because the file cannot be used: %s", error)
            else:
                self._take([*self._fixed, *keys])
                log.info("%s: %d API keys are accepted now.", self._path, len(self._accounts))
            self._version = version

    def _current_version(self) -> object:
        assert self._path is not None
        try:
            status = self._path.stat()
        except OSError as error:
            return error.errno
        # `st_ctime` changes with every change: `chmod` may make the file readable, and copies may
        # keep the time of modification.
        return status.st_ctime_ns, status.st_size, status.st_ino
