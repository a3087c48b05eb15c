"""Sets up every test process, and says which tests must run in the same process."""

import os
import signal
from pathlib import Path

import pytest

from serve_app.protocol.tokenizer import Tokenizer
from tests.nvml import nvml as nvml  # a fixture

# Triton's kernels run in its interpreter, which it decides when it is first imported. A machine
# with a GPU sets 0, and tests them there.
os.environ.setdefault("TRITON_INTERPRET", "1")

SPLIT = ("tests/model/kernels/test_compiled.py", "tests/model/kernels/test_gpu_step.py")
"""Files whose tests take long and share nothing: each test is a group of its own."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups the tests for `pytest -n N --dist loadgroup`: one process runs a whole group.

    Tests that start Ray are one group, so that one Ray cluster runs at a time. The others are
    grouped by file, so that each module's fixtures are made once.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        path = item.nodeid.partition("::")[0]
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.xdist_group("ray"))
        elif path not in SPLIT:
            item.add_marker(pytest.mark.xdist_group(path))


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mixtral 8x7B's own tokenizer, 32,000 entries, as tokenizer.json."""
    from tools import mixtral_tokenizer

    return mixtral_tokenizer.write(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def mixtral_tokenizer(mixtral_folder: Path) -> Tokenizer:
    """Our tokenizer for `mixtral_folder`."""
    return Tokenizer(mixtral_folder)


# A background job of a shell starts with Ctrl-C's signal ignored, and its children inherit that.
# The tests that send the signal, to this process or to a child, need Python's own handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
