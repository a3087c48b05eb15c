"""The benchmark's cases for the CUDA kernels, with kernels that write down their arguments."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.cuda_cases import makers
from benchmarks.kernel_cases import Shapes
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.quantization import Quantization
from tools.random_model import config_of


def test_each_case_launches_a_product_of_its_size() -> None:
    """Every product alternates between its weights, with activations and results of the batch's
    size."""
    tiny = config_of(tiny=True, layers=1)
    config = replace(tiny, hidden_size=2048, intermediate_size=4096, num_local_experts=2)
    config = replace(config, num_attention_heads=16, head_dim=128)
    how = Quantization("nf4", "bfloat16")
    shapes = Shapes(config, how, torch.bfloat16, torch.device("cpu"), layers=2, min_bytes=0)
    launches: list[tuple[Any, ...]] = []

    class Recorded:
        def __init__(self, *how: Any) -> None: ...

        def launch(self, *arguments: Any, blocks: int | None = None) -> None:
            launches.append(arguments)

    expected = {
        "gate_up (cuda)": (8192, 2048, (10, 4096)),
        "down (cuda)": (2048, 4096, (10, 2048)),
        "qkv (cuda)": (2560, 2048, (5, 2560)),
        "o (cuda)": (2048, 2048, (5, 2048)),
    }
    made = makers(shapes, Card(90, 1), Recorded)
    assert made.keys() == expected.keys()
    for name, make in made.items():
        (case,) = make(shapes, sizes=(5,))  # type: ignore[call-arg]
        launches.clear()
        case[-1]()
        assert case[:3] == (name, 5, None)
        assert len(launches) == case[4] == 2
        rows, columns, result = expected[name]
        for codes, absmax, _, x, *_, y, _, out_features, tokens in launches:
            assert (out_features, tokens, y.shape) == (rows, 5, result)
            assert codes.shape[1:] == (rows, columns // 2)
            assert absmax.shape[1:] == (rows, columns // 64)
            assert x.shape[1] == columns
