"""The experts of one layer: eight (or any number of) feed-forward networks, each token in a few.

Knows how expert weights are stored and multiplied, and nothing of routing: another storage is
another class with the same `forward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.config import MixtralConfig
from serve_app.model.rows import row_multiple


class Experts(nn.Module):
    """Experts as two stacked matrices, in the dtype of the model.

    Letters: T tokens, k choices per token, E experts, H hidden_size, I intermediate_size.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden), requires_grad=False)
        self.down = nn.Parameter(torch.empty(experts, hidden, inner), requires_grad=False)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights[t, j] * down(silu(gate(x[t])) * up(x[t])) of expert expert_ids[t, j].

        `x` `[T, H]`, `expert_ids` `[T, k]` int64, `weights` `[T, k]` of x's dtype -> `[T, H]`.
        """
        num_tokens, top_k = expert_ids.shape
        rows, ends, num_rows = _group(expert_ids.flatten(), self.down.shape[0], row_multiple(x))
        grouped = x.new_zeros(num_rows, x.shape[1])
        grouped[rows] = x.repeat_interleave(top_k, dim=0)
        gate, up = F.grouped_mm(grouped, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        outputs = F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        chosen = outputs[rows].view(num_tokens, top_k, -1)
        return (chosen * weights[..., None]).sum(dim=1)


def _group(expert_ids: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, int]:
    """Rows for `expert_ids` `[n]` such that each expert's are adjacent, padded to `multiple`.

    Returns the row of each entry `[n]`, the end of each expert's rows `[E]` int32, and their count.
    """
    order = expert_ids.argsort(stable=True)
    counts = torch.zeros_like(expert_ids[:1]).repeat(num_experts)
    counts.scatter_add_(0, expert_ids, torch.ones_like(expert_ids))
    padded = counts if multiple == 1 else (counts + (multiple - 1)) // multiple * multiple
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    rows = place + shift[expert_ids]
    # Without padding the count is known without asking the device.
    num_rows = len(order) if multiple == 1 else int(ends[-1])
    return rows, ends.to(torch.int32), num_rows
