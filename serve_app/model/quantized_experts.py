"""QuantizedExperts: the experts of one layer with 4-bit weights, in plain torch.

The weights need a quarter of the memory of `Experts`. This module is the reference for kernels. The
matrices of an expert are dequantized for a product and freed after it, so that only about
`DEQUANTIZE_WEIGHTS` weights exist as floats at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serve_app.model.config import MixtralConfig
from serve_app.model.experts import gather_rows, group_by_expert, weighted_sum
from serve_app.model.quantize import DEQUANTIZE_WEIGHTS
from serve_app.model.quantized_weight import INTERLEAVED_ROWS, Codebook, QuantizedWeight
from serve_app.model.row_padding import row_multiple


class QuantizedExperts(nn.Module):
    """Experts with 4-bit weights. Shapes use the letters of `Experts`."""

    def __init__(self, config: MixtralConfig, codebook: Codebook) -> None:
        super().__init__()
        stack, hidden_size = (config.num_local_experts,), config.hidden_size
        halves = (config.intermediate_size, config.intermediate_size)
        self.gate_up = QuantizedWeight(codebook, stack, hidden_size, halves, interleaved=True)
        """`[E, 2I, H]`: 8 rows of gate, 8 rows of up, and so on, alternating."""
        self.down = QuantizedWeight(codebook, stack, config.intermediate_size, (hidden_size,))
        """`[E, H, I]`"""

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """See `Experts.forward`. Waits for the device, because the host needs `ends`."""
        num_experts = len(self.down.packed)
        rows, ends, num_rows = group_by_expert(topk_ids, num_experts, row_multiple(x))
        grouped = gather_rows(x, rows, num_rows)
        outputs = torch.empty_like(grouped)
        bounds = [0, *ends.tolist()]
        used = [expert for expert in range(num_experts) if bounds[expert] < bounds[expert + 1]]
        num_at_once = max(1, DEQUANTIZE_WEIGHTS // self.gate_up.packed[0].numel() // 2)
        for start in range(0, len(used), num_at_once):
            group = used[start : start + num_at_once]
            part = slice(bounds[group[0]], bounds[group[-1] + 1])
            experts = torch.tensor(group, device=x.device)
            outputs[part] = self._compute(experts, grouped[part], ends[experts] - part.start)
        return weighted_sum(outputs, rows, topk_weights)

    def _compute(self, experts: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """Maps `x` `[n, H]` to `[n, H]` with `experts`. The rows of the i-th expert end at
        `ends[i]`."""
        gate_up = _product(x, self.gate_up.floats(experts, x.dtype), ends)
        gate, up = gate_up.view(len(x), -1, 2, INTERLEAVED_ROWS).unbind(dim=2)  # [n, I / 8, 8]
        return _product((F.silu(gate) * up).flatten(1), self.down.floats(experts, x.dtype), ends)


def _product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiplies `x` `[n, K]` by `weights` `[e, N, K]`. Returns `[n, N]`.

    The rows of matrix i end at `ends[i]`.
    """
    if len(weights) == 1 and x.is_cuda:  # one plain product is faster than a group of one
        return F.linear(x, weights[0])
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
