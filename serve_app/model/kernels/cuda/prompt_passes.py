"""The products of a step with few prompt tokens, by the kernels of the decode step.

These read 4-bit weights once for each pass of some tokens, where dequantizing reads them once,
writes them as floats and reads these again. `max_tokens` computes up to how many tokens passes are
faster on a card.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.launcher import checked, cuda_driver
from serve_app.model.kernels.cuda.products import CudaProducts
from serve_app.model.kernels.cuda.use_kernels import tiled
from serve_app.model.kernels.triton.prompt_routing import route_prompts
from serve_app.model.linear import QuantizedLinear

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

PASS_TOKENS, ROW_TILE = 64, 128
"""Tokens of an expert in one pass, and in one tile of the grouped product."""
PACKED_BYTES, FLOAT_BYTES = 0.5 + 2 / 64, 2
"""Bytes of a weight in 4 bits with its absmax, and as a float."""
SHARE_OF_BANDWIDTH, SHARE_OF_FLOPS = 0.9, 0.6
"""Shares of the peak that kernels reach. An H200 reads 4.59 of 4.9 TB/s; the second number is
assumed."""
DECODE_CYCLES = 0.057
"""Cycles of a multiprocessor for decoding a weight: on an H200 (132 multiprocessors, 1.98 GHz) the
prototypes took 374 + 213 us for a pass over the 1.41e9 weights of a layer's experts, which is 0.109
cycles a weight, and its matrix products take 0.052 of them by `SHARE_OF_FLOPS`."""
FLOPS_PER_CYCLE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
"""Operations of a multiprocessor in bfloat16 with float32 sums, by compute capability."""


@dataclass(frozen=True)
class CardSpeed:
    """The peak rates of a GPU, computed from its clocks."""

    bandwidth: float
    """Bytes/s of its memory."""
    cycles: float
    """Cycles/s of all multiprocessors together."""
    flops: float
    """Operations/s of matrix products in bfloat16."""


def speed_of(device: torch.device) -> CardSpeed:
    """The speed of a CUDA device. Raises `DriverError`."""
    properties = torch.cuda.get_device_properties(device)
    driver = cuda_driver()
    attribute = driver.CUdevice_attribute
    names = ("MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH", "CLOCK_RATE")
    number = torch.cuda.current_device() if device.index is None else device.index
    handle = checked("cuDeviceGet", driver.cuDeviceGet(number))
    memory_khz, bus_bits, khz = (
        int(checked(name, driver.cuDeviceGetAttribute(found, handle)))
        for name in names
        if (found := getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"))
    )
    cycles = properties.multi_processor_count * khz * 1e3
    flops = FLOPS_PER_CYCLE.get(10 * properties.major + properties.minor, 512)
    return CardSpeed(2 * memory_khz * 1e3 * bus_bits / 8, cycles, cycles * flops)


def max_tokens(config: MixtralConfig, speed: CardSpeed) -> int:
    """Returns the most tokens of a step for which passes take no longer than dequantized weights.

    Computed for a layer's experts, with tokens that choose all experts alike. Unpacking counts as
    memory traffic alone: it runs beside the products, and what it takes from them is not known
    before it is measured. On an H200 the result is 496 for Mixtral 8x7B.
    """
    matrix = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_local_experts * matrix
    bandwidth, flops = SHARE_OF_BANDWIDTH * speed.bandwidth, SHARE_OF_FLOPS * speed.flops
    decoding = weights * DECODE_CYCLES / speed.cycles
    a_pass = max(weights * PACKED_BYTES / bandwidth, decoding + weights * 2 * PASS_TOKENS / flops)
    unpacked_bytes = weights * (PACKED_BYTES + 2 * FLOAT_BYTES)
    tokens = 0
    while tokens < 4096:
        of_expert = (tokens + 16) * config.num_experts_per_tok / config.num_local_experts
        # On average an expert's last pass or tile is half full.
        passes = max(1.0, of_expert / PASS_TOKENS + 0.5)
        tiles = max(1.0, of_expert / ROW_TILE + 0.5)
        products = weights * 2 * ROW_TILE * tiles / flops
        if passes * a_pass > max(unpacked_bytes / bandwidth, products):
            break
        tokens += 16
    return tokens


class PassedProducts:
    """The `PromptProducts` of `triton/prompt_products.py` that dequantize nothing."""

    def __init__(self, model: "Mixtral", products: CudaProducts) -> None:
        self._model: Any = model
        self._products = products

    def begin(self) -> None:
        """See `PromptProducts`."""

    def qkv(self, layer: int, x: Tensor) -> Tensor:
        return self._dense(self._model.layers[layer].attention.qkv, x)

    def o(self, layer: int, x: Tensor) -> Tensor:
        return self._dense(self._model.layers[layer].attention.o, x)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self._model.layers[layer].mlp
        gate_up, down = tiled(mlp.experts.gate_up), tiled(mlp.experts.down)
        order, starts, topk_weights = route_prompts(F.linear(x, mlp.router), mlp.top_k)
        inner = x.new_empty(len(order), down.in_features)
        self._products.gate_up(gate_up, x, order, starts, inner)
        out = x.new_empty(len(order), down.out_features, dtype=torch.float32)
        self._products.down(down, inner, order, starts, topk_weights, mlp.top_k, out)
        return out[None]

    def _dense(self, linear: QuantizedLinear, x: Tensor) -> Tensor:
        weight = tiled(linear.weight)
        out = x.new_empty(len(x), weight.out_features, dtype=torch.float32)
        self._products.dense(weight, x, out)
        return out[None]
