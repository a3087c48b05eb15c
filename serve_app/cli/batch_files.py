"""The two files of a batch: requests are read from one, results are appended to the other."""

import fcntl
import json
from collections.abc import Collection, Iterator
from io import BufferedRandom
from pathlib import Path

from serve_app.config.serve_config import ConfigError
from serve_app.protocol import batch
from serve_app.protocol.batch import BatchRequest, BatchResult, LineReader

Key = str | int
"""The key of a line's result, from `batch.key`."""


class BatchInput:
    """The file of requests. Every iteration reads the file again, so it need not fit into
    memory."""

    def __init__(self, path: Path, urls: Collection[str]) -> None:
        """`urls` are the API paths that a request may use. Raises `ConfigError` if `path` is not a
        file."""
        self._path = path
        self._urls = urls
        if not path.is_file():
            raise ConfigError(f"{path}: this is not a file; name a file with one request per line.")

    def __iter__(self) -> Iterator[tuple[Key, BatchRequest | BatchResult]]:
        """Yields the key of each line with its request, or with a result if the line is not a
        request."""
        reader = LineReader(self._urls)
        with self._path.open("rb") as lines:
            for number, text in enumerate(lines, start=1):
                if text.strip():
                    line = reader.read(number, text)
                    yield line.custom_id if isinstance(line, BatchRequest) else number, line


class BatchOutput:
    """The file of results. A lock keeps other batches from appending to it."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file, and removes an incomplete last line.

        Raises `ConfigError` if the file cannot be used.
        """
        self._path = path
        self.answered: set[Key] = set()
        """Keys of the results whose requests were answered without an error."""
        self.failed: set[Key] = set()
        """Keys of the other results."""
        try:
            self._file: BufferedRandom = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self._file.close()
            raise ConfigError(f"{path}: another batch writes to this file; wait for it.") from None
        except BaseException:
            self._file.close()
            raise

    def write(self, result: BatchResult) -> None:
        """Appends one result and syncs it to the disk. Raises `ConfigError`."""
        text = json.dumps(result, separators=(",", ":"))
        try:
            self._file.write(text.encode("ascii") + b"\n")
            self._file.flush()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be written: {error.strerror}.") from None
        self._add(result)

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self.answered or key in self.failed

    def __iter__(self) -> Iterator[Key]:
        yield from self.answered
        yield from self.failed

    def __len__(self) -> int:
        return len(self.answered) + len(self.failed)

    def _read(self) -> None:
        self._file.seek(0)
        end = 0
        for number, text in enumerate(self._file, start=1):
            if not text.endswith(b"\n"):
                break
            end += len(text)
            try:
                self._add(json.loads(text))
            except (ValueError, LookupError, TypeError):
                raise ConfigError(
                    f"{self._path}: line {number} is not a result of a batch; name another file."
                ) from None
        self._file.truncate(end)

    def _add(self, result: BatchResult) -> None:
        (self.answered if batch.is_answered(result) else self.failed).add(batch.key(result))
