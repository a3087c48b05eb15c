"""The Triton kernels between a decode step's products, run by Triton's interpreter."""

from itertools import pairwise

import pytest
import torch

from serve_app.model.kernels.triton.step_kernels import route


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("experts", [5, 8])
def test_a_row_that_is_not_finite_harms_itself_alone(experts: int, bad: float) -> None:
    """A row of NaN gets NaN as its weights; every entry still has its own place in the order."""
    logits = torch.randn(4, experts, generator=torch.Generator().manual_seed(0))
    logits[1] = bad
    lens = torch.tensor([3, 3, 0, 3], dtype=torch.int32)
    order, starts, shares = route(logits, lens, 3)
    assert sorted(order[: starts[-1]].tolist()) == [*range(6), *range(9, 12)]
    for expert, (begin, end) in enumerate(pairwise(starts)):
        sound = [entry // 3 for entry in order[begin:end].tolist() if entry // 3 != 1]
        assert all(expert in logits[row].topk(3).indices for row in sound)
    assert shares[3:6].isnan().all()
    expected = logits.topk(3).values.softmax(-1)
    torch.testing.assert_close(shares.view(4, 3)[[0, 3]], expected[[0, 3]])
