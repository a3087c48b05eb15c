"""TopFilter: applies top_k, top_p and min_p."""

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.sampling_params import SamplingParams
from serve_app.engine.transfer import floats_to_device, to_device


class TopFilter:
    """Masks improbable tokens: top_k first, then top_p of the remaining tokens, then min_p.

    Example: probabilities 0.5, 0.2, 0.2, 0.06, 0.04 with `top_k` 4, `top_p` 0.9 and `min_p` 0.5.
    top_k keeps the first four, which become 0.52, 0.21, 0.21, 0.06. top_p keeps the first three,
    because they sum to more than 0.9. min_p keeps the first: the others are below 0.5 * 0.52.

    Each row has one threshold, so equal logits are kept or masked together, and their order in the
    vocabulary does not matter.
    """

    def __init__(self, params: list[SamplingParams], vocab_size: int, device: torch.device) -> None:
        def column(values: list[float]) -> Tensor:
            return floats_to_device(values, device)[:, None]

        self._is_sorted = any(0 < p.top_k < vocab_size or p.top_p < 1 for p in params)
        last = [min(p.top_k, vocab_size) - 1 if p.top_k else vocab_size - 1 for p in params]
        self._last = to_device(last, device)[:, None]
        # Rounding may make the sum of probabilities reach 1 before the last token.
        self._top_p = column([p.top_p if p.top_p < 1 else torch.inf for p in params])
        self._log_min_p = column([p.min_p for p in params]).log()

    def apply(self, scores: Tensor) -> Tensor:
        """Returns `scores` `[rows, vocab]` (logits / temperature) with -inf for masked tokens."""
        if self._is_sorted:
            ordered = _sort_descending(scores)
            best = ordered[:, :1]
            kth = ordered.gather(1, self._last)
            probs = ordered.masked_fill(ordered < kth, -torch.inf).softmax(-1)
            is_kept = probs.cumsum(-1) - probs < self._top_p
            last = (is_kept.sum(-1, keepdim=True) - 1).clamp_(min=0)
            threshold = torch.maximum(kth, ordered.gather(1, last))
        else:
            best = scores.amax(-1, keepdim=True)
            threshold = torch.full_like(best, -torch.inf)
        threshold = torch.maximum(threshold, best + self._log_min_p)
        return scores.masked_fill(scores < threshold, -torch.inf)


def _sort_descending(scores: Tensor) -> Tensor:
    """Returns `scores` `[rows, vocab]` with each row sorted, the highest first."""
    if not scores.is_cpu:
        return scores.sort(-1, descending=True).values
    # On a CPU numpy's sort takes half the time or less.
    return torch.from_numpy(np.sort(scores.neg().numpy(), axis=-1)).neg_()
