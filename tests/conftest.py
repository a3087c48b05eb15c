"""Sets up every test process, and says which tests must run in the same process."""

import os
import random
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from serve_app.protocol.tokenizer import Tokenizer
from tests.nvml import nvml as nvml  # a fixture

# Triton's kernels run in its interpreter, which it decides when it is first imported. A machine
# with a GPU sets 0, and tests them there.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Compute threads sleep while they wait. By default they spin, and test processes that share the
# cores then take twice the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Property tests try the same examples in every run, save for constants that hypothesis finds in the
# sources of loaded modules; `--hypothesis-profile=default` tries others. They are not timed, since
# machines are shared and slow at times.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

SPLIT = (
    "tests/model/kernels/test_compiled.py",
    "tests/model/kernels/cuda/test_compiled.py",
    "tests/model/kernels/test_gpu_step.py",
)
"""Files whose tests take long and share nothing: each test is a group of its own."""
LONGEST = (
    "ray",
    "tests/worker/test_drain.py",
    "tests/model/kernels/test_compiled.py",
    "tests/model/kernels/cuda/test_products.py",
    "tests/model/kernels/cuda/test_compiled.py",
    "tests/model/kernels/cuda/test_overlap.py",
    "tests/benchmarks/test_gpu.py",
    "tests/model/kernels/test_gpu_step.py",
    "tests/start_plan/test_memory.py",
    "tests/model/kernels/cuda/test_use_kernels.py",
    "tests/engine/test_device_sampler.py",
    "tests/cli/test_quality.py",
    "tests/api/test_page_in_browser.py",
    "tests/test_app.py",
    "tests/api/test_tool_calls.py",
    "tests/start_plan/test_hub.py",
    "tests/worker/test_examples.py",
    "tests/worker/test_posts.py",
    "tests/worker/test_poll.py",
)
"""The groups that take longest, longest first. They run first, so that no process ends with a long
one while the others have nothing left to do."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups the tests for `pytest -n N --dist loadgroup --no-loadscope-reorder`.

    One process runs a whole group, and groups start in the order of their first tests. Tests that
    start Ray are one group, so that one Ray cluster runs at a time. The others are grouped by file,
    so that each module's fixtures are made once.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = group_of(item)
        if group not in SPLIT:
            item.add_marker(pytest.mark.xdist_group(group))
    rank = {group: number for number, group in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(group_of(item), len(rank)))


def group_of(item: pytest.Item) -> str:
    """Returns "ray", or the file of the test."""
    is_ray = item.get_closest_marker("ray") is not None
    return "ray" if is_ray else item.nodeid.partition("::")[0]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Gives a test the same random numbers in every run, in any order, and alone."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def mixtral_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mixtral 8x7B's own tokenizer, 32,000 entries, as tokenizer.json."""
    from tools import mixtral_tokenizer

    return mixtral_tokenizer.write(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="session")
def mixtral_tokenizer(mixtral_folder: Path) -> Tokenizer:
    """Our tokenizer for `mixtral_folder`."""
    return Tokenizer(mixtral_folder)


@pytest.fixture(scope="session")
def tool_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Our tokenizer for Mixtral 8x22B's files, which have tool tokens."""
    from tools import mixtral_tokenizer

    return Tokenizer(mixtral_tokenizer.write_with_tools(tmp_path_factory.mktemp("tools")))


# A background job of a shell starts with Ctrl-C's signal ignored, and its children inherit that.
# The tests that send the signal, to this process or to a child, need Python's own handler.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
