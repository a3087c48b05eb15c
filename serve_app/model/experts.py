"""The experts of one layer: eight (or any number of) feed-forward networks, each token in a few.

Knows how expert weights are stored and multiplied, and nothing of routing: another storage is
another class with the same `forward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.config import MixtralConfig
from serve_app.model.nf4 import Quantized
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

    def put(self, expert: int, name: str, weight: Tensor | Quantized) -> None:
        """Fills matrix `name` ("gate" `[I, H]`, "up" `[I, H]` or "down" `[H, I]`) of an expert."""
        assert isinstance(weight, Tensor)
        if name == "down":
            self.down[expert].copy_(weight)
        else:
            self.gate_up[expert].chunk(2)[("gate", "up").index(name)].copy_(weight)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """sum_j weights[t, j] * down(silu(gate(x[t])) * up(x[t])) of expert expert_ids[t, j].

        `x` `[T, H]`, `expert_ids` `[T, k]` int64, `weights` `[T, k]` of x's dtype -> `[T, H]`.
        """
        rows, ends, num_rows = group_by_expert(expert_ids, self.down.shape[0], row_multiple(x))
        grouped = x.new_zeros(num_rows, x.shape[1])
        grouped[rows] = x[:, None]
        gate, up = F.grouped_mm(grouped, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return (outputs[rows] * weights[..., None]).sum(dim=1)


def group_by_expert(
    expert_ids: Tensor, num_experts: int, multiple: int
) -> tuple[Tensor, Tensor, int]:
    """Rows for `expert_ids` `[T, k]` such that each expert's are adjacent, padded to `multiple`.

    Returns the row of each entry `[T, k]`, the end of each expert's rows `[E]` int32, and how many
    rows there are. Asks the device nothing unless rows are padded.
    """
    flat = expert_ids.flatten()
    experts = torch.arange(num_experts, device=flat.device)
    seen = (flat[:, None] == experts).cumsum(0)  # [T * k, E]: entries of each expert so far
    sizes = seen[-1]
    if multiple > 1:
        sizes = (sizes + (multiple - 1)) // multiple * multiple
    ends = sizes.cumsum(0)
    rows = seen.add_(ends - sizes - 1).gather(1, flat[:, None])
    num_rows = len(flat) if multiple == 1 else int(ends[-1])
    return rows.view_as(expert_ids), ends.to(torch.int32), num_rows
