"""Pads the rows of a matrix product on a CPU, so that each row's bits do not depend on other rows.

MKL's float32 kernels compute a few rows differently from many rows, and split rows between threads,
which changes the last bits. With 4 rows per thread, and at least 16 rows, every row is computed in
the same way. (Measured with MKL 2024.2: processors with AMX need the 16 rows, older ones do not.
MKL may still split sums of 1,024 and more elements between threads.) Other dtypes and devices are
not padded, because padding does not make their rows independent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MAX_THREADS = 8
"""No padding with more threads, because it would cost more than the products."""


def row_multiple(x: Tensor) -> int:
    """Returns the number that must divide the number of rows of `x`; 1 for no padding.

    Example: 16 for float32 on a CPU with 2 threads, 32 with 8 threads.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return 1
    return max(MIN_ROWS, 4 * min(torch.get_num_threads(), MAX_THREADS))


def pad_rows(x: Tensor) -> Tensor:
    """Appends rows of zeros to `x` `[n, size]` until their number is a multiple of
    `row_multiple(x)`."""
    missing = -x.shape[0] % row_multiple(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x
