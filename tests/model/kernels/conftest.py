"""The Triton kernels run in Triton's interpreter here, and no test finds what another one left."""

from collections.abc import Iterator

import pytest
import torch

from tests.triton_interpreter import prepare_once

prepare_once()


@pytest.fixture(autouse=True)
def _fresh_buffers() -> Iterator[None]:
    """New tensors are NaN or the largest integer.

    Otherwise a buffer may lie where the same buffer lay before, and a kernel that leaves a part of
    it out, or writes the same bytes into it again, would give the right result.
    """
    if torch.cuda.is_available():  # a GPU has no such mode for all that is tested
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
