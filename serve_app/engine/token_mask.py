"""TokenMask: masks the tokens that grammars do not allow in a batch's logits."""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.constraint import Constraint


class TokenMask:
    """The rows of a batch whose answers follow a grammar."""

    def __init__(self, constraints: dict[int, Constraint], device: torch.device) -> None:
        """`constraints` maps rows of the batch to their constraints."""
        self._constraints = list(constraints.values())
        self._rows = torch.tensor(list(constraints), device=device)

    def apply(self, logits: Tensor) -> None:
        """Sets the logits of tokens that are not allowed to -inf, in `logits` `[batch, vocab]`.

        On a GPU, the host computes the mask while the device computes the logits. If a grammar has
        become too complex, all logits of its row become -inf, so its token is `FAILED`.
        """
        vocab_size = logits.shape[1]
        allowed = np.zeros((len(self._constraints), -(-vocab_size // 32)), np.int32)
        for row, constraint in zip(allowed, self._constraints, strict=True):
            constraint.fill(row)
        bits = np.unpackbits(allowed.view(np.uint8), axis=1, bitorder="little")
        is_allowed = torch.from_numpy(bits[:, :vocab_size]).to(logits.device, non_blocking=True)
        logits[self._rows] = logits[self._rows].masked_fill_(is_allowed == 0, -torch.inf)
