"""The products of a step with few prompt tokens, by the kernels of the decode step.

There are two ways to multiply prompt tokens by 4-bit weights. Passes read the 4-bit weights once
for every 64 or 128 tokens of an expert. Dequantizing reads them once, writes them as floats,
and reads the floats again. `max_tokens` computes the number of tokens up to which passes are faster
on a card.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.kernels.cuda.launcher import DriverError, cuda_driver, unwrap
from serve_app.model.kernels.cuda.products import CudaProducts
from serve_app.model.kernels.cuda.use_kernels import tiled
from serve_app.model.kernels.triton.prompt_routing import route_prompts
from serve_app.model.linear import QuantizedLinear

if TYPE_CHECKING:
    from serve_app.model.mixtral import Mixtral

ROW_TILE = 128
"""Number of an expert's tokens in one tile of the grouped product."""
PACKED_BYTES, FLOAT_BYTES = 0.5 + 2 / 64, 2
"""Bytes of a weight in 4 bits with its share of absmax, and as a bfloat16."""
SHARE_OF_BANDWIDTH, SHARE_OF_FLOPS = 0.9, 0.6
"""Shares of a card's peak rates that kernels reach. The first is measured: an H200 reads 4.59 of
4.9 TB/s. The second is assumed."""
UNPACK_SHARE_OF_BANDWIDTH = 0.7
"""Share of the bandwidth that dequantizing and the products reach together, because they compete
for the memory. Chosen so that `max_tokens` gives what was measured on an H200: there both ways take
the same time for 770 tokens, 19.5 ms for 8 layers of Mixtral 8x7B."""
DECODE_CYCLES = 0.071
"""Cycles of a multiprocessor for decoding one weight. On an H200 (132 multiprocessors, 1.98 GHz) a
pass of 128 tokens over the 1.41e9 weights of a layer's experts took 0.945 ms: 0.175 cycles a
weight. The matrix products take 0.104 of them, computed with `SHARE_OF_FLOPS`."""
FLOPS_PER_CYCLE = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
"""Operations per cycle of a multiprocessor in bfloat16 with float32 sums, by compute capability."""


@dataclass(frozen=True)
class CardSpeed:
    """The peak rates of a GPU, computed from its clocks."""

    bandwidth: float
    """Bytes per second of its memory."""
    cycles: float
    """Cycles per second of all multiprocessors together."""
    flops: float
    """Operations per second of matrix products in bfloat16."""


def speed_of(device: torch.device) -> CardSpeed:
    """Returns the speed of a CUDA device.

    Raises `DriverError` if a call fails, or if the driver reports no clocks (virtual GPUs, GPUs
    that share the machine's memory).
    """
    properties = torch.cuda.get_device_properties(device)
    driver = cuda_driver()
    attribute = driver.CUdevice_attribute
    names = ("MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH", "CLOCK_RATE")
    number = torch.cuda.current_device() if device.index is None else device.index
    handle = unwrap("cuDeviceGet", driver.cuDeviceGet(number))
    memory_khz, bus_bits, khz = (
        int(unwrap(name, driver.cuDeviceGetAttribute(number_of_attribute, handle)))
        for name in names
        if (number_of_attribute := getattr(attribute, f"CU_DEVICE_ATTRIBUTE_{name}"))
    )
    if not (memory_khz and bus_bits and khz):
        raise DriverError("the driver reports no clock rates or memory bus")
    cycles = properties.multi_processor_count * khz * 1e3
    flops = FLOPS_PER_CYCLE.get(10 * properties.major + properties.minor, 512)
    return CardSpeed(2 * memory_khz * 1e3 * bus_bits / 8, cycles, cycles * flops)


def max_tokens(config: MixtralConfig, speed: CardSpeed, pass_tokens: int) -> int:
    """Returns the number of tokens up to which passes take no longer than dequantizing.

    Both times are computed for the experts of one layer, with tokens distributed evenly over the
    experts. A pass computes up to `pass_tokens` tokens of an expert. Dequantizing and its products
    overlap, so the longer of memory traffic and matrix products counts.

    Example: on an H200 (4.8 TB/s) the result is 768 for Mixtral 8x7B. One pass over a layer's
    experts takes 0.95 ms (decoding 0.38, products 0.56), and dequantizing them 1.90 ms. With 768
    tokens each expert gets 192, which need 2 passes on average: 1.89 ms.
    """
    matrix = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_local_experts * matrix
    flops = SHARE_OF_FLOPS * speed.flops
    decoding = weights * DECODE_CYCLES / speed.cycles
    reading = weights * PACKED_BYTES / (SHARE_OF_BANDWIDTH * speed.bandwidth)
    pass_s = max(reading, decoding + weights * 2 * pass_tokens / flops)
    unpacked_bytes = weights * (PACKED_BYTES + 2 * FLOAT_BYTES)
    unpacking = unpacked_bytes / (UNPACK_SHARE_OF_BANDWIDTH * speed.bandwidth)
    tokens = 0
    while tokens < 4096:
        expert_tokens = (tokens + 16) * config.num_experts_per_tok / config.num_local_experts
        # On average an expert's last pass or tile is half full.
        passes = max(1.0, expert_tokens / pass_tokens + 0.5)
        tiles = max(1.0, expert_tokens / ROW_TILE + 0.5)
        if passes * pass_s > max(unpacking, weights * 2 * ROW_TILE * tiles / flops):
            break
        tokens += 16
    return tokens


class PassedProducts:
    """`PromptProducts` (`triton/prompt_products.py`) by passes, without dequantized weights."""

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
        routing = route_prompts(F.linear(x, mlp.router), mlp.top_k)
        return self._products.experts(gate_up, down, x, *routing)[None]

    def _dense(self, linear: QuantizedLinear, x: Tensor) -> Tensor:
        weight = tiled(linear.weight)
        out = x.new_empty(len(x), weight.out_features, dtype=torch.float32)
        self._products.dense(weight, x, out)
        return out[None]
