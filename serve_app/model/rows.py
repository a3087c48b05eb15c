"""How many rows a matrix product needs so that each row's bits do not depend on the others."""

import torch
from torch import Tensor

MAX_THREADS = 8
"""With more threads the padding would cost more than the products that it pads."""


def row_multiple(x: Tensor) -> int:
    """Rows of the factor `x` must be padded to a multiple of this.

    MKL's float32 kernels treat a few left-over rows apart and split rows between threads, which
    changes the last bits; with 4 rows per thread every row is computed alike. Other dtypes and
    devices gain nothing from padding.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return 1
    return 4 * min(torch.get_num_threads(), MAX_THREADS)


def round_up(rows: int, multiple: int) -> int:
    return -(-rows // multiple) * multiple
