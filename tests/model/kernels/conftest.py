"""The Triton kernels run in Triton's interpreter here."""

from tests.triton_interpreter import prepare_once

prepare_once()
