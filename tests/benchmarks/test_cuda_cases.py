"""The benchmark's cases for the CUDA kernels, with kernels that write down their arguments."""

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cuda_cases import makers
from benchmarks.kernel_cases import AttentionInputs, Shapes
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.quantization import Quantization
from tests.model.kernels.cuda.emulator import has_compiler
from tests.model.kernels.cuda.host_kernels import HostKernels
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
    assert made.keys() == {*expected, "attention (cuda)"}
    for name in expected:
        make = made[name]
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


@pytest.mark.skipif(not has_compiler(), reason="g++ compiles the kernels for the host")
def test_the_case_of_attention_fills_its_result() -> None:
    """The source run on the host gives what torch's attention gives over the last layer's pages."""
    config = replace(config_of(tiny=True, layers=1), num_key_value_heads=4, head_dim=64)
    how = Quantization("nf4", "bfloat16")
    shapes = Shapes(config, how, torch.bfloat16, torch.device("cpu"), layers=2, min_bytes=0)
    make = makers(shapes, Card(90, 1), HostKernels())["attention (cuda)"]
    (case,) = make(shapes, sizes=((2, 70),))  # type: ignore[call-arg]
    assert case[:4] == ("attention (cuda)", 2, 70, 2 * 2 * 70 * 4 * 64 * 2)
    case[-1]()
    of: AttentionInputs = inspect.signature(case[-1]).parameters["of"].default
    pages = (page[of.tables.long()].flatten(1, 2)[:, :70] for page in of.pages[-1])
    keys, values = (page.transpose(1, 2).repeat_interleave(2, 1).float() for page in pages)
    queries = of.queries.float()[:, :, None]
    expected = F.scaled_dot_product_attention(queries, keys, values).flatten(1)
    assert (of.result - expected).norm() < 1e-2 * expected.norm()
