"""What every test process needs before anything else is imported."""

import os

from tests.nvml import nvml as nvml  # a fixture

# Triton's kernels run in its interpreter, which it decides when it is first imported. A machine
# with a GPU sets 0, and tests them there.
os.environ.setdefault("TRITON_INTERPRET", "1")
