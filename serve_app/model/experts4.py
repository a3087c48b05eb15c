"""The experts of one layer in 4 bits: the same `forward` as `Experts`, a quarter of the memory.

Plain torch: the same on every device, and what a kernel has to match. An expert's weights are
unpacked when a token comes to it and forgotten after the product, so that never more than one
matrix of one expert exists as floats, or of several where they are small.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.config import MixtralConfig
from serve_app.model.experts import group_by_expert
from serve_app.model.matrices4 import GROUP, Codes, Matrices4
from serve_app.model.nf4 import CHUNK, Quantized
from serve_app.model.rows import row_multiple


class Experts4(nn.Module):
    """Experts as two stacks of 4-bit matrices; letters as in `Experts`.

    `gate_up` `[E, 2I, H]` has the rows of gate and up interleaved, 8 of one, 8 of the other.
    """

    def __init__(self, config: MixtralConfig, codes: Codes) -> None:
        super().__init__()
        experts, hidden, inner = (config.num_experts,), config.hidden_size, config.intermediate_size
        self.gate_up = Matrices4(codes, experts, hidden, (inner, inner), interleaved=True)
        self.down = Matrices4(codes, experts, inner, (hidden,))

    def put(self, expert: int, name: str, weight: Tensor | Quantized) -> None:
        """Fills matrix `name` ("gate", "up" or "down") of an expert, quantising floats."""
        if name == "down":
            self.down.put((expert,), 0, weight)
        else:
            self.gate_up.put((expert,), ("gate", "up").index(name), weight)

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """As `Experts.forward`; asks the device which experts are hit."""
        num_experts = len(self.down.packed)
        rows, ends, num_rows = group_by_expert(expert_ids, num_experts, row_multiple(x))
        grouped = x.new_zeros(num_rows, x.shape[1])
        grouped[rows] = x[:, None]
        outputs = torch.empty_like(grouped)
        bounds = [0, *ends.tolist()]
        hit = [expert for expert in range(num_experts) if bounds[expert] < bounds[expert + 1]]
        step = max(1, CHUNK // self.gate_up.packed[0].numel() // 2)
        for some in (hit[i : i + step] for i in range(0, len(hit), step)):
            part = slice(bounds[some[0]], bounds[some[-1] + 1])
            chosen = torch.tensor(some, device=x.device)
            outputs[part] = self._compute(chosen, grouped[part], ends[chosen] - part.start)
        return (outputs[rows] * weights[..., None]).sum(dim=1)

    def _compute(self, experts: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """`x` `[n, H]` through `experts`, each with its rows up to `ends` int32 -> `[n, H]`."""
        both = _product(x, self.gate_up.floats(experts, x.dtype), ends)
        gate, up = both.view(len(x), -1, 2, GROUP).unbind(dim=2)  # each [n, I / 8, 8]
        inner = (F.silu(gate) * up).flatten(1)
        return _product(inner, self.down.floats(experts, x.dtype), ends)


def _product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`x` `[n, K]` times `weights` `[e, N, K]`, each with its rows up to `ends` -> `[n, N]`."""
    if len(weights) == 1 and x.is_cuda:  # where a plain product is the fastest there is
        return F.linear(x, weights[0])
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
