"""Copies a checkpoint's weights into a model in memory, by the table of tensor names."""

from operator import attrgetter

import torch
from torch import Tensor, nn

from serve_app.errors import ModelLoadFailed
from serve_app.model.checkpoint.tensor_names import Weight
from serve_app.model.mixtral import Mixtral
from serve_app.model.quantize import QuantizedTensor
from serve_app.model.quantized_weight import QuantizedWeight


def module_weight(model: Mixtral, path: str) -> nn.Parameter | QuantizedWeight:
    """Returns the weight of `model` at `path`, see `Row.path` in `tensor_names.py`."""
    weight: nn.Parameter | QuantizedWeight = attrgetter(path)(model)
    return weight


def load_weight(model: Mixtral, weight: Weight, values: Tensor | QuantizedTensor) -> None:
    """Copies `values` of shape `weight.shape` into `model`. Quantizes floats for a 4-bit weight."""
    target = module_weight(model, weight.path)
    if isinstance(target, QuantizedWeight):
        target.load_weight(values, weight.expert, weight.index)
        return
    assert isinstance(values, Tensor)
    matrix = target if weight.expert is None else target[weight.expert]
    matrix[weight.rows].copy_(values)


def load_lm_head(model: Mixtral, weight: Weight, values: Tensor) -> None:
    """Copies `values` into lm_head, after all other weights.

    Raises `ModelLoadFailed` if the quantized lm_head has other code values than the checkpoint's
    weights, because all weights of a model share one codebook.
    """
    tables: list[Tensor] = []
    if isinstance(module_weight(model, weight.path), QuantizedWeight):
        assert model.codebook is not None
        tables = list(model.codebook.buffers())
    before = [table.clone() for table in tables]
    load_weight(model, weight, values)
    if not all(map(torch.equal, before, tables)):
        raise ModelLoadFailed(
            "lm_head cannot be quantized like the checkpoint's weights: their code values differ "
            "from ours; set `model.quantize_lm_head` to false."
        )
