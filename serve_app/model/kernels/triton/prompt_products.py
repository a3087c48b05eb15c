"""The products of a step with prompt tokens on a GPU, in the forms that a `PromptStep` uses.

`TorchProducts` is the reference: the model's own products. `UnpackedProducts` dequantizes 4-bit
weights and multiplies by them with `grouped_product.py`. The host does not need to know which
experts the tokens use, so it does not wait for the device. `cuda/prompt_passes.py` has a third
form, for few tokens.
"""

from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.kernels.cuda.use_kernels import tiled
from serve_app.model.kernels.triton.grouped_product import Routing, down, gate_up, shape_of
from serve_app.model.kernels.triton.nf4_unpack import Unpacker
from serve_app.model.kernels.triton.prompt_routing import route_prompts
from serve_app.model.kernels.triton.unpack_ahead import (
    CudaStreams,
    Job,
    Unpack,
    UnpackAhead,
)
from serve_app.model.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral


class PromptProducts(Protocol):
    """The products of one model. Each maps T tokens to parts `[S, T * C, N]`.

    The result is the sum over S and C. `layer` is the layer's index.
    """

    def begin(self) -> None:
        """Starts a step. The products must then be called layer by layer: qkv, o, mlp."""
        ...

    def qkv(self, layer: int, x: Tensor) -> Tensor: ...
    def o(self, layer: int, x: Tensor) -> Tensor: ...
    def mlp(self, layer: int, x: Tensor) -> Tensor: ...


class TorchProducts:
    """The model's own products in torch. With 4-bit experts they wait for the device."""

    def __init__(self, model: "Mixtral") -> None:
        self._model: Any = model

    def begin(self) -> None:
        """See `PromptProducts`."""

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        parts: Tensor = self._model.layers[layer].attention.qkv(x)[None]
        return parts

    def o(self, layer: int, x: Tensor) -> Tensor:
        parts: Tensor = self._model.layers[layer].attention.o(x)[None]
        return parts

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        parts: Tensor = self._model.layers[layer].mlp(x, len(x))[None]
        return parts


class UnpackedProducts:
    """Products with 4-bit weights, which a kernel dequantizes before each product needs them.

    `experts_at_once` experts are dequantized together. More experts need fewer launches and more
    memory (`footprint.workspace_bytes`). All experts are dequantized before the router's choice is
    known, because steps with many tokens use all of them.
    """

    def __init__(self, model: "Mixtral", experts_at_once: int) -> None:
        self._model: Any = model
        dtype, device = model.embedding.dtype, model.embedding.device
        self._shape = shape_of(device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)
        all_experts = torch.arange(model.config.num_local_experts, device=device)
        self._groups = torch.split(all_experts, experts_at_once)
        jobs = [job for layer in self._model.layers for job in self._jobs(layer)]
        streams = CudaStreams(device) if device.type == "cuda" else None
        self._ahead = UnpackAhead(unpack_of(model), jobs, dtype, device, streams)

    def begin(self) -> None:
        """See `PromptProducts`."""
        self._ahead.begin()

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        return F.linear(x, self._ahead.take()[0])[None]

    def o(self, layer: int, x: Tensor) -> Tensor:
        return F.linear(x, self._ahead.take()[0])[None]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self._model.layers[layer].mlp
        routing = Routing(*route_prompts(F.linear(x, mlp.router), mlp.top_k), mlp.top_k)
        out = x.new_empty(len(routing.order), x.shape[1])
        rows = len(x) * min(len(self._groups[0]), mlp.top_k)
        inner = x.new_empty(rows, self._model.config.intermediate_size)
        first = 0
        for group in self._groups:
            gate_up(x, self._ahead.take(), routing, first, inner, self._shape)
            down(inner, self._ahead.take(), routing, first, out, self._shape)
            first += len(group)
        return out[None]

    def _jobs(self, layer: Any) -> list[Job]:
        """Returns the jobs of a layer, in the order of its products."""
        attention, experts = layer.attention, layer.mlp.experts
        jobs = [
            Job(attention.qkv.weight, self._first, "qkv"),
            Job(attention.o.weight, self._first, "o"),
        ]
        for group in self._groups:
            jobs += [Job(experts.gate_up, group, "gate_up"), Job(experts.down, group, "down")]
        return jobs


def unpack_of(model: "Mixtral") -> Unpack:
    """Returns the function that dequantizes the model's weights by a kernel."""
    products = model.products
    if products is None:
        unpacker = Unpacker(model.embedding.dtype)
        for module in model.modules():
            if isinstance(module, QuantizedWeight):
                unpacker.prepare(module)
        return unpacker.into

    def unpack(weight: QuantizedWeight, indices: Tensor, out: Tensor) -> None:
        products.unpack_into(tiled(weight), indices, out)

    return unpack
