"""Cases of `benchmarks.kernels`: one kernel with random inputs of one size, ready to be timed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from serve_app.model.config import MixtralConfig
from serve_app.model.quantization import Quantization
from serve_app.model.quantized_weight import Codebook, QuantizedWeight
from tools.random_model import fill_codebook, fill_matrices

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = ((1, 512), (1, 8192), (32, 2048))
"""Numbers of rows, and the context length of each row."""
BLOCK_SIZE = 16


Case = tuple[str, int, int | None, float, int, Callable[[], object]]
"""Name, rows, context, bytes of a launch, number of launches, and the function that does them."""


@dataclass
class Shapes:
    """The model's sizes and dtype, and how many layers' weights the launches go round."""

    config: MixtralConfig
    quantization: Quantization
    dtype: torch.dtype
    device: torch.device
    layers: int
    """Layers that the launches go round, at least."""
    min_bytes: int
    """Bytes that these layers have together, at least: several times the size of a cache."""

    def rounds(self, num_bytes: float) -> int:
        """Returns the number of layers of `num_bytes` between which the launches alternate, so that
        no layer is in the cache."""
        return max(self.layers, -(-self.min_bytes // int(num_bytes)))

    def matrices(
        self, lead: tuple[int, ...], columns: int, rows: tuple[int, ...]
    ) -> list[QuantizedWeight]:
        """Returns random matrices, one for each layer."""
        codes = Codebook(self.quantization.quant_type).to(self.device)
        fill_codebook(codes)
        made = []
        for _ in range(self.rounds(prod(lead) * columns * sum(rows) / 2)):
            with torch.device(self.device):
                one = QuantizedWeight(codes, lead, columns, rows, interleaved=len(rows) == 2)
            fill_matrices(one)
            made.append(one)
        return made


def makers(tiny: bool) -> dict[str, Callable[[Shapes], Iterable[Case]]]:
    """Returns the functions that create the cases of each kernel. Weights exist as long as the
    cases."""
    tokens = (2,) if tiny else TOKENS
    contexts = ((2, 140),) if tiny else CONTEXTS
    products = {"gate_up": gate_up, "down": down, "qkv": qkv, "o": out}
    made: dict[str, Callable[[Shapes], Iterable[Case]]] = {
        name: partial(make, sizes=tokens) for name, make in products.items()
    }
    made["attention"] = lambda shapes: (attention(shapes, *sizes) for sizes in contexts)
    return made


def routing(shapes: Shapes, tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Returns a random routing of `tokens`: `order`, `starts`, `shares`, and the number of experts
    with tokens."""
    config = shapes.config
    scores = torch.rand(
        tokens, config.num_local_experts, generator=torch.Generator().manual_seed(tokens)
    )
    ids = scores.topk(config.num_experts_per_tok).indices.flatten()
    order = ids.argsort(stable=True).int()
    starts = torch.tensor([int((ids < e).sum()) for e in range(config.num_local_experts + 1)]).int()
    shares = torch.full((len(ids),), 1 / config.num_experts_per_tok)
    moved = [tensor.to(shapes.device) for tensor in (order, starts, shares)]
    return moved[0], moved[1], moved[2], len(set(ids.tolist()))


def bytes_of(matrices: QuantizedWeight, experts: int = 1) -> float:
    """Returns the bytes of one matrix, or of `experts` matrices of a stack."""
    lead = matrices.packed.shape[0] if matrices.packed.dim() == 3 else 1
    return (matrices.packed.nbytes + matrices.absmax.nbytes) / lead * experts


def gate_up(shapes: Shapes, sizes: tuple[int, ...]) -> list[Case]:
    from serve_app.model.kernels.triton import nf4_decode

    config, inner = shapes.config, shapes.config.intermediate_size
    matrices = shapes.matrices((config.num_local_experts,), config.hidden_size, (inner, inner))
    weights = [nf4_decode.Packed.from_weight(one, shapes.dtype) for one in matrices]
    found: list[Case] = []
    for tokens in sizes:
        order, starts, _, hit = routing(shapes, tokens)
        x = torch.randn(tokens, config.hidden_size, device=shapes.device).to(shapes.dtype)
        y = x.new_empty(tokens * config.num_experts_per_tok, inner)

        def work(x: Tensor = x, y: Tensor = y, o: Tensor = order, s: Tensor = starts) -> None:
            for one in weights:
                nf4_decode.gate_up(one, x, o, s, config.num_experts_per_tok, y)

        found.append(("gate_up", tokens, None, bytes_of(matrices[0], hit), len(weights), work))
    return found


def down(shapes: Shapes, sizes: tuple[int, ...]) -> list[Case]:
    from serve_app.model.kernels.triton import nf4_decode

    config = shapes.config
    stack = ((config.num_local_experts,), config.intermediate_size, (config.hidden_size,))
    matrices = shapes.matrices(*stack)
    weights = [nf4_decode.Packed.from_weight(one, shapes.dtype) for one in matrices]
    found: list[Case] = []
    for tokens in sizes:
        rows = tokens * config.num_experts_per_tok
        *route, hit = routing(shapes, tokens)
        x = torch.randn(rows, config.intermediate_size, device=shapes.device).to(shapes.dtype)
        y = torch.empty(nf4_decode.SPLIT_K, rows, config.hidden_size, device=shapes.device)

        def work(x: Tensor = x, y: Tensor = y, route: Any = route) -> None:
            order, starts, shares = route
            for one in weights:
                nf4_decode.down(one, x, order, starts, shares, config.num_experts_per_tok, y)

        found.append(("down", tokens, None, bytes_of(matrices[0], hit), len(weights), work))
    return found


def qkv(shapes: Shapes, sizes: tuple[int, ...]) -> list[Case]:
    config = shapes.config
    queries, keys = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    return dense("qkv", shapes, sizes, config.hidden_size, (queries, keys, keys))


def out(shapes: Shapes, sizes: tuple[int, ...]) -> list[Case]:
    config = shapes.config
    return dense(
        "o", shapes, sizes, config.num_attention_heads * config.head_dim, (config.hidden_size,)
    )


def dense(
    name: str, shapes: Shapes, sizes: tuple[int, ...], columns: int, rows: tuple[int, ...]
) -> list[Case]:
    from serve_app.model.kernels.triton import nf4_decode

    matrices = shapes.matrices((), columns, rows)
    weights = [nf4_decode.Packed.from_weight(one, shapes.dtype) for one in matrices]
    found: list[Case] = []
    for tokens in sizes:
        x = torch.randn(tokens, columns, device=shapes.device).to(shapes.dtype)
        y = torch.empty(nf4_decode.SPLIT_K, tokens, sum(rows), device=shapes.device)

        def work(x: Tensor = x, y: Tensor = y) -> None:
            for one in weights:
                nf4_decode.dense(one, x, y)

        found.append((name, tokens, None, bytes_of(matrices[0]), len(weights), work))
    return found


@dataclass(frozen=True)
class AttentionInputs:
    """Random inputs of attention for rows of one context length."""

    pages: list[list[Tensor]]
    """Keys and values of each layer, `[blocks, BLOCK_SIZE, KV heads, D]`."""
    num_bytes: float
    """Bytes of the rows' keys and values in a layer."""
    tables: Tensor
    """int32 `[rows, blocks of a row]`"""
    lens: Tensor
    """int32 `[rows]`"""
    queries: Tensor
    """`[rows, heads, D]`"""
    result: Tensor
    """`[rows, heads * D]`, to be filled."""

    @classmethod
    def random(cls, shapes: Shapes, rows: int, context: int) -> "AttentionInputs":
        config, device, dtype = shapes.config, shapes.device, shapes.dtype
        width = -(-context // BLOCK_SIZE)
        page = (rows * width, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        num_bytes = 2.0 * rows * context * config.kv_size * dtype.itemsize
        pages = [
            [torch.randn(page, device=device).to(dtype) for _ in range(2)]
            for _ in range(shapes.rounds(num_bytes))
        ]
        tables = torch.randperm(rows * width, device=device).int().view(rows, width)
        lens = torch.full((rows,), context, dtype=torch.int32, device=device)
        heads = (rows, config.num_attention_heads, config.head_dim)
        queries = torch.randn(heads, device=device).to(dtype)
        return cls(pages, num_bytes, tables, lens, queries, torch.empty_like(queries).flatten(1))


def attention(shapes: Shapes, rows: int, context: int) -> Case:
    from serve_app.model.kernels.triton.paged_attention import PagedAttention

    of = AttentionInputs.random(shapes, rows, context)
    kernel = PagedAttention(shapes.config.num_attention_heads, of.pages[0][0], None, rows)

    def work() -> None:
        for keys, values in of.pages:
            kernel(of.queries, keys, values, of.tables, of.lens, of.result)

    return "attention", rows, context, of.num_bytes, len(of.pages), work
