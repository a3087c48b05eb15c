"""The experts of one layer: feed-forward networks; each token uses a few of them.

The router (`mixtral.SparseMLP`) chooses the experts. `QuantizedExperts` has the same `forward` with
4-bit weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.config import MixtralConfig
from serve_app.model.row_padding import row_multiple


class Experts(nn.Module):
    """Experts with float weights.

    Letters: T tokens, k experts per token, E experts, H hidden_size, I intermediate_size.
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__()
        num_experts, hidden_size = config.num_local_experts, config.hidden_size
        gate_up = torch.empty(num_experts, 2 * config.intermediate_size, hidden_size)
        down = torch.empty(num_experts, hidden_size, config.intermediate_size)
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        """`[E, 2I, H]`: the rows of the gate projection, then those of the up projection."""
        self.down = nn.Parameter(down, requires_grad=False)
        """`[E, H, I]`"""

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Computes sum_j topk_weights[t, j] * expert(topk_ids[t, j])(x[t]).

        An expert computes down(silu(gate(x)) * up(x)). `x` is `[T, H]`, `topk_ids` int64 `[T, k]`,
        `topk_weights` `[T, k]` in x's dtype. Returns `[T, H]`.
        """
        rows, ends, num_rows = group_by_expert(topk_ids, self.down.shape[0], row_multiple(x))
        grouped = gather_rows(x, rows, num_rows)
        gate, up = F.grouped_mm(grouped, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        outputs = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return weighted_sum(outputs, rows, topk_weights)


def group_by_expert(
    topk_ids: Tensor, num_experts: int, multiple: int
) -> tuple[Tensor, Tensor, int]:
    """Assigns a row to each pair of token and expert, so that the rows of each expert are adjacent.

    The number of rows of each expert is padded to a multiple of `multiple`. Returns the row of each
    entry of `topk_ids` `[T, k]`, the end of each expert's rows (int32 `[E]`), and the number of
    rows. Waits for the device only if rows are padded.

    Example with 3 experts: topk_ids [[2, 0], [0, 1]] gives rows [[3, 0], [1, 2]], ends [2, 3, 4]
    and 4 rows.
    """
    flat = topk_ids.flatten()
    experts = torch.arange(num_experts, device=flat.device)
    # [E, T * k]: number of each expert's entries so far. A sum over the other dimension takes 1.4
    # ms for 8,192 entries on an H200, because a GPU then adds with one thread for each expert.
    counts = (flat == experts[:, None]).cumsum(1)
    sizes = counts[:, -1]
    if multiple > 1:
        sizes = (sizes + (multiple - 1)) // multiple * multiple
    ends = sizes.cumsum(0)
    rows = counts.add_((ends - sizes - 1)[:, None]).gather(0, flat[None])
    num_rows = len(flat) if multiple == 1 else int(ends[-1])
    return rows.view_as(topk_ids), ends.to(torch.int32), num_rows


def gather_rows(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Copies row t of `x` `[T, H]` to the rows `rows[t]` of the result `[num_rows, H]`.

    Rows of the result that are not in `rows` `[T, k]` are padding; they are copies of row 0.
    """
    sources = rows.new_zeros(num_rows)
    sources[rows] = torch.arange(len(x), device=x.device)[:, None]
    return x.index_select(0, sources)


def weighted_sum(outputs: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Returns sum_j weights[t, j] * outputs[rows[t, j]], `[T, H]`.

    `outputs` is `[n, H]`; `rows` and `weights` are `[T, k]`.
    """
    chosen = outputs.index_select(0, rows.flatten()).view(*rows.shape, -1)
    return (chosen * weights[..., None]).sum(dim=1)
