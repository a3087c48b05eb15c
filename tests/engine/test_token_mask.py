"""The masks of grammars on the logits of a batch."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from serve_app.engine.token_mask import mask_on_device, mask_on_host


@pytest.mark.parametrize("mask", [mask_on_host, mask_on_device])
@pytest.mark.parametrize("vocab_size", [32, 45, 1000])
@pytest.mark.parametrize("rows", [[1, 3], [0, 1, 2, 3]])
def test_the_logits_of_refused_tokens_become_minus_infinity(
    mask: Callable[..., None], vocab_size: int, rows: list[int]
) -> None:
    """Bit i of a row's words stands for token i; other logits and rows without a grammar stay."""
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (len(rows), -(-vocab_size // 32)), np.int32)
    logits = torch.from_numpy(random.normal(size=(4, vocab_size)).astype(np.float32))
    expected = logits.tolist()
    for row, own in zip(rows, words.tolist(), strict=True):
        for token in range(vocab_size):
            if not own[token // 32] >> token % 32 & 1:
                expected[row][token] = -np.inf
    mask(logits, rows, words)
    assert logits.tolist() == expected
