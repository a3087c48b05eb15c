"""Routing and products of prompts in Triton, run by the interpreter, beside plain torch's."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.experts import Experts
from serve_app.model.kernels.triton import prompt_routing
from serve_app.model.kernels.triton.grouped_product import Routing, TileShape, down, gate_up
from serve_app.model.kernels.triton.prompt_routing import route_prompts
from tools.random_model import TINY

SMALL = TileShape(16, 64, 16, num_stages=1)
"""Tiles that do not divide the sizes of these tests."""
SHAPES = {"addresses": SMALL, "descriptor": replace(SMALL, by_descriptor=True)}


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (45, 5, 3), (70, 8, 2)])
def test_tokens_are_ordered_by_expert(
    tokens: int, experts: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs: entries by expert and token, the weights of torch's softmax."""
    monkeypatch.setattr(prompt_routing, "ROWS", 32)
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    order, starts, weights = route_prompts(logits, top_k)
    topk = logits.topk(top_k)
    flat = topk.indices.flatten()
    assert order.tolist() == flat.argsort(stable=True).tolist()
    assert starts.tolist() == [int((flat < e).sum()) for e in range(experts + 1)]
    torch.testing.assert_close(weights.view(tokens, top_k), topk.values.softmax(-1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_that_is_not_finite_harms_itself_alone(
    bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of NaN gets NaN as its weights; every entry still has its own place in the order."""
    monkeypatch.setattr(prompt_routing, "ROWS", 4)
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    logits[1] = bad
    order, starts, weights = route_prompts(logits, 3)
    assert sorted(order.tolist()) == list(range(18))
    for expert, (begin, end) in enumerate(pairwise(starts.tolist())):
        sound = [entry // 3 for entry in order[begin:end].tolist() if entry // 3 != 1]
        assert all(expert in logits[row].topk(3).indices for row in sound)
    assert weights[3:6].isnan().all()
    assert weights[6:].isfinite().all()


def by_turns(gate_up_weights: Tensor) -> Tensor:
    """Returns `[E, 2 * I, H]`, gate above up, as 8 rows of gate and 8 of up by turns."""
    gate, up = gate_up_weights.chunk(2, dim=1)
    blocks = [half.reshape(len(half), -1, 8, half.shape[-1]) for half in (gate, up)]
    return torch.stack(blocks, dim=2).flatten(1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_they_give_what_experts_give(dtype: torch.dtype, at_once: int, shape: TileShape) -> None:
    """An expert without tokens, one with nearly all, odd sizes; experts in groups."""
    sizes = {"hidden_size": 48, "intermediate_size": 48, "num_local_experts": 5}
    config = MixtralConfig.from_dict({**TINY, **sizes})
    experts = Experts(config)
    generator = torch.Generator().manual_seed(1)
    for weight in (experts.gate_up, experts.down):
        weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
    x = torch.randn(37, 48, generator=generator)
    logits = torch.randn(37, 5, generator=generator)
    logits[:, 0] += 4  # nearly every token
    logits[:, 3] -= 9  # no token
    topk = logits.topk(2)
    expected = experts(x, topk.indices, topk.values.softmax(-1))
    routing = Routing(*route_prompts(logits, 2), top_k=2)
    weights = by_turns(experts.gate_up).to(dtype), experts.down.to(dtype)
    out = torch.full((74, 48), torch.nan, dtype=dtype)
    for first in range(0, 5, at_once):
        inner = torch.full((37 * min(2, at_once), 48), torch.nan, dtype=dtype)
        some = slice(first, first + at_once)
        gate_up(x.to(dtype), weights[0][some].contiguous(), routing, first, inner, shape)
        down(inner, weights[1][some].contiguous(), routing, first, out, shape)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    found = out.float().view(37, 2, 48).sum(1)
    assert float((found - expected).norm() / expected.norm()) < tolerance
