"""Pads the rows of a matrix product on a CPU, so that each row's bits do not depend on the others.

MKL's float32 kernels compute a few rows in another way than many, and split rows between threads,
which changes the last bits. With 4 rows per thread, and at least 16, every row is computed alike.
(Measured with MKL 2024.2: processors with AMX need the 16, older ones do not. MKL may still split
sums of 1,024 and more between threads.) Other dtypes and devices gain nothing from padding and are
left alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_ROWS = 16
MAX_THREADS = 8
"""With more threads the padding would cost more than the products that it pads."""


def row_multiple(x: Tensor) -> int:
    """Returns the number that the rows of the factor `x` must be a multiple of; 1 if nothing is
    padded.

    For example 16 for float32 on a CPU with 2 threads, 32 with 8.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return 1
    return max(MIN_ROWS, 4 * min(torch.get_num_threads(), MAX_THREADS))


def pad_rows(x: Tensor) -> Tensor:
    """`x` `[n, size]` with rows of zeros below, as many as `row_multiple` asks for."""
    missing = -x.shape[0] % row_multiple(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x
