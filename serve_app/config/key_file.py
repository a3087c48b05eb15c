"""The file of API keys: their names, hashes and limits.

It contains only SHA-256 hashes, no keys. A plain hash is enough, because keys are 256 random bits,
which cannot be guessed. The file is replaced atomically, so a reader never sees a partial file. It
keeps its owner, group and mode: the server may run as another user than the command.
"""

import fcntl
import hashlib
import json
import os
import secrets
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.config.serve_config import ConfigError

PREFIX = "sk-mixtral-"
"""Prefix of every key. Scanners use it to find leaked keys in logs and repositories."""
NUM_BYTES = 32
FIXED_PREFIX = "API_KEYS-"
"""Prefix of the names of keys that are not in the file (`api.keys`); no key of the file has it."""


class KeyLimits(BaseModel):
    """The limits of one key. None means no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens of prompts and answers together."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Maximum number of prompts that are running or waiting."""
    min_priority: int = Field(default=0, ge=-1000, le=1000)
    """Minimum `priority` of its requests; a smaller `priority` is raised to it."""


class ApiKey(KeyLimits):
    """One key of the file."""

    name: str = Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")
    """The name in logs and metrics, where the key itself never appears."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: int
    """Unix seconds."""


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...]

    @model_validator(mode="after")
    def _are_different(self) -> "_Contents":
        """A name identifies a key in limits, log and metrics."""
        for values in ([key.name for key in self.keys], [key.sha256 for key in self.keys]):
            if twice := [value for value, count in Counter(values).items() if count > 1]:
                raise ValueError(f"{twice[0]} is there more than once")
        if any(key.name.startswith(FIXED_PREFIX) for key in self.keys):
            raise ValueError(f"names that begin with {FIXED_PREFIX} are for the variable API_KEYS")
        return self


def sha256(key: str) -> str:
    """Returns the hash that identifies a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Returns the keys of the file. Raises `ConfigError` if it cannot be read."""
    try:
        return _Contents.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "keys"
        cause = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: this is not a file of API keys: {where}: {cause}.") from None


def add_key(path: Path, name: str, limits: KeyLimits) -> str:
    """Adds a new key, and creates the file if there is none. Returns the key, which is not stored.

    Raises `ConfigError` if the name is used or invalid.
    """
    key = PREFIX + secrets.token_urlsafe(NUM_BYTES)
    path = path.resolve()  # a link stays one
    with _locked(path):
        keys = read_keys(path) if path.exists() else ()
        if any(entry.name == name for entry in keys):
            raise ConfigError(f"{path}: a key {name!r} exists already; remove it first.")
        try:
            new = ApiKey(
                name=name, sha256=sha256(key), created=int(time.time()), **limits.model_dump()
            )
            contents = _Contents(keys=(*keys, new))
        except ValidationError:
            raise ConfigError(
                f"{name!r} cannot be the name of a key: use up to 64 letters, digits and `._@-`, "
                f"without {FIXED_PREFIX} at the beginning."
            ) from None
        _write(path, contents)
    return key


def remove_key(path: Path, name: str) -> None:
    """Removes a key. Raises `ConfigError` if no key has this name."""
    path = path.resolve()
    with _locked(path):
        keys = read_keys(path)
        remaining = tuple(key for key in keys if key.name != name)
        if len(remaining) == len(keys):
            raise ConfigError(f"{path}: there is no key {name!r}.")
        _write(path, _Contents(keys=remaining))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Locks the file, so that concurrent commands do not lose each other's changes."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise ConfigError(f"{path.parent}: cannot be opened ({error.strerror}).") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, contents: _Contents) -> None:
    text = json.dumps(contents.model_dump(exclude_defaults=True), indent=1) + "\n"
    try:
        before = path.stat() if path.exists() else None
        # A new file is for this user alone: mkstemp gives mode 0600.
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(number, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                if before is not None:
                    os.fchown(number, before.st_uid, before.st_gid)
                    os.fchmod(number, stat.S_IMODE(before.st_mode))
                os.fsync(number)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink()
            raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None
