"""TokenMask: masks the tokens that grammars do not allow in a batch's logits."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.engine.constraint import Constraint
from serve_app.engine.transfer import tensor_to_device, to_device


class TokenMask:
    """The rows of a batch whose answers follow a grammar."""

    def __init__(self, constraints: dict[int, Constraint]) -> None:
        """`constraints` maps rows of the batch to their constraints."""
        self._constraints = list(constraints.values())
        self._rows = list(constraints)

    def apply(self, logits: Tensor) -> None:
        """Sets the logits of tokens that are not allowed to -inf, in `logits` `[batch, vocab]`.

        On a GPU, the host computes the mask while the device computes the logits. If a grammar has
        become too complex, all logits of its row become -inf, so its token is `FAILED`.
        """
        vocab_size = logits.shape[1]
        allowed = np.zeros((len(self._constraints), -(-vocab_size // 32)), np.int32)
        for row, constraint in zip(allowed, self._constraints, strict=True):
            constraint.fill(row)
        # On a CPU numpy is several times as fast as torch.
        mask = mask_on_host if logits.is_cpu else mask_on_device
        mask(logits, self._rows, allowed)


def mask_on_host(logits: Tensor, rows: list[int], allowed: NDArray[np.int32]) -> None:
    """Sets logits on a CPU to -inf: in row `rows[i]`, those whose bits in `allowed[i]` are 0.

    `rows` are in ascending order.
    """
    num_tokens = logits.shape[1]
    refused = np.unpackbits(~allowed.view(np.uint8), axis=1, bitorder="little", count=num_tokens)
    host = logits.numpy()
    if len(rows) == len(host):  # all rows; one call is faster
        np.copyto(host, -np.inf, where=refused.view(np.bool_))
        return
    for row, is_refused in zip(rows, refused.view(np.bool_), strict=True):
        np.copyto(host[row], -np.inf, where=is_refused)


def mask_on_device(logits: Tensor, rows: list[int], allowed: NDArray[np.int32]) -> None:
    """Does the same as `mask_on_host` on a device. Copies the packed bits to it."""
    device = logits.device
    words = tensor_to_device(torch.from_numpy(allowed), device)
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=device) & 1
    is_refused = bits.flatten(1)[:, : logits.shape[1]] == 0
    index = to_device(rows, device)
    logits[index] = logits[index].masked_fill_(is_refused, -torch.inf)
