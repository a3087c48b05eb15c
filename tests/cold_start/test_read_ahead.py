"""Reading ahead fills the page cache while a block runs, and stops when the load reads."""

import ctypes
import json
import mmap
import os
import threading
from pathlib import Path

import pytest

from serve_app.cold_start import read_ahead
from serve_app.cold_start.read_ahead import CHECK_BYTES, read, while_starting
from tests.worker.conftest import until

SIZE = 3 * CHECK_BYTES


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files that are on disk and not in the page cache."""
    made, block = [], os.urandom(1 << 20)
    for name in ("1.safetensors", "2.safetensors"):
        file = tmp_path / name
        with file.open("wb") as stream:
            for _ in range(SIZE >> 20):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        made.append(file)
    return made


def cached(file: Path) -> float:
    """Returns the share of a file that is in the page cache (mincore(2))."""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as pages:
        num_pages = -(-len(pages) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * num_pages)()
        view = (ctypes.c_char * len(pages)).from_buffer(pages)
        libc = ctypes.CDLL(None, use_errno=True)
        address, size = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(pages))
        assert libc.mincore(address, size, resident) == 0
        del view
        return sum(page & 1 for page in resident) / num_pages


def test_the_files_are_in_the_page_cache(files: list[Path]) -> None:
    """A thread reads all files while the block runs."""
    assert max(cached(file) for file in files) < 0.5
    with while_starting(files, None):
        # Not to the last page: the kernel may take some back.
        until(lambda: all(cached(file) > 0.9 for file in files))


def test_it_ends_when_the_loader_reads(files: list[Path], tmp_path: Path) -> None:
    """Two readers of one disk would slow each other down."""
    load_log = tmp_path / "load.jsonl"
    load_log.write_text(json.dumps({"phase": "device", "state": "started", "at": 1}) + "\n")
    assert read(files, str(load_log), threading.Event()) == 2 * SIZE
    with load_log.open("a") as file:
        file.write(json.dumps({"phase": "read and quantize", "state": "started", "at": 2}) + "\n")
    assert read(files, str(load_log), threading.Event()) == CHECK_BYTES


def test_it_ends_when_stopped_and_when_memory_is_short(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading ahead takes at most half of the free memory, and leaves 2 GB free."""
    told = threading.Event()
    told.set()
    assert read(files, None, told) <= read_ahead.BUFFER_BYTES
    monkeypatch.setattr(read_ahead, "free_bytes", lambda: 3 * CHECK_BYTES)
    assert read(files, None, threading.Event()) == CHECK_BYTES  # less is free than it spares
    monkeypatch.setattr(read_ahead, "MIN_FREE_BYTES", 0)
    assert read(files, None, threading.Event()) == 2 * CHECK_BYTES  # half of it, and one look


def test_a_missing_file_is_ignored(tmp_path: Path) -> None:
    """A missing file raises nothing here; the load names it."""
    assert read([tmp_path / "gone.safetensors"], None, threading.Event()) == 0
    assert read([], None, threading.Event()) == 0
