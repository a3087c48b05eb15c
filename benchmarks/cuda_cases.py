"""Cases of `benchmarks.kernels` for the CUDA kernels of 4-bit products and attention."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernel_cases import (
    CONTEXTS,
    TOKENS,
    AttentionInputs,
    Case,
    Shapes,
    bytes_of,
    routing,
)
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.launchable import MakeKernel
from serve_app.model.kernels.cuda.products import CudaProducts
from serve_app.model.kernels.cuda.step_kernels import AttentionMemory, StepKernels
from serve_app.model.kernels.cuda.use_kernels import card_of, maker_of, products_of, tiled
from serve_app.model.kernels.cuda.variants import Card
from serve_app.model.kernels.decode_batch import DecodeBatch
from serve_app.model.quantize import code_values


def makers(
    shapes: Shapes, card: Card | None = None, make: MakeKernel | None = None
) -> dict[str, Callable[[Shapes], Iterable[Case]]]:
    """Returns functions that create the cases of each kernel. `card` and `make` default to the
    device's."""
    config = shapes.config
    card = card or card_of(shapes.device)
    make = make or maker_of(Compiler(card.capability))
    code = code_values(shapes.quantization.quant_type, shapes.device)
    products = products_of(config, card, code, make)
    qkv = (config.q_size, config.kv_size, config.kv_size)
    return {
        "gate_up (cuda)": partial(gate_up, products),
        "down (cuda)": partial(down, products),
        "qkv (cuda)": partial(dense, products, "qkv", config.hidden_size, qkv),
        "o (cuda)": partial(dense, products, "o", config.q_size, (config.hidden_size,)),
        "attention (cuda)": partial(attention, StepKernels(config, card, make)),
    }


def gate_up(
    products: CudaProducts, shapes: Shapes, sizes: tuple[int, ...] = TOKENS
) -> Iterable[Case]:
    config, inner = shapes.config, shapes.config.intermediate_size
    stack = ((config.num_local_experts,), config.hidden_size, (inner, inner))
    matrices = shapes.matrices(*stack)
    weights = [tiled(one) for one in matrices]
    for tokens in sizes:
        order, starts, _, hit = routing(shapes, tokens)
        x = torch.randn(tokens, config.hidden_size, device=shapes.device).bfloat16()
        y = x.new_empty(len(order), inner)

        def work(x: Tensor = x, y: Tensor = y, o: Tensor = order, s: Tensor = starts) -> None:
            for one in weights:
                products.gate_up(one, x, o, s, y)

        yield "gate_up (cuda)", tokens, None, bytes_of(matrices[0], hit), len(weights), work


def down(products: CudaProducts, shapes: Shapes, sizes: tuple[int, ...] = TOKENS) -> Iterable[Case]:
    config = shapes.config
    stack = ((config.num_local_experts,), config.intermediate_size, (config.hidden_size,))
    matrices = shapes.matrices(*stack)
    weights, top_k = [tiled(one) for one in matrices], config.num_experts_per_tok
    for tokens in sizes:
        order, starts, shares, hit = routing(shapes, tokens)
        x = torch.randn(len(order), config.intermediate_size, device=shapes.device).bfloat16()
        y = torch.empty(len(order), config.hidden_size, device=shapes.device)
        routed = (order, starts, shares)

        def work(
            x: Tensor = x, y: Tensor = y, routed: tuple[Tensor, Tensor, Tensor] = routed
        ) -> None:
            for one in weights:
                products.down(one, x, *routed, top_k, y)

        yield "down (cuda)", tokens, None, bytes_of(matrices[0], hit), len(weights), work


def dense(
    products: CudaProducts,
    name: str,
    columns: int,
    rows: tuple[int, ...],
    shapes: Shapes,
    sizes: tuple[int, ...] = TOKENS,
) -> Iterable[Case]:
    matrices = shapes.matrices((), columns, rows)
    weights = [tiled(one) for one in matrices]
    for tokens in sizes:
        x = torch.randn(tokens, columns, device=shapes.device).bfloat16()
        y = torch.empty(tokens, sum(rows), device=shapes.device)

        def work(x: Tensor = x, y: Tensor = y) -> None:
            for one in weights:
                products.dense(one, x, y)

        yield f"{name} (cuda)", tokens, None, bytes_of(matrices[0]), len(weights), work


def attention(
    kernels: StepKernels, shapes: Shapes, sizes: tuple[tuple[int, int], ...] = CONTEXTS
) -> Iterable[Case]:
    for rows, context in sizes:
        of = AttentionInputs.random(shapes, rows, context)
        memory = AttentionMemory(shapes.config, rows, shapes.device)
        numbers = of.lens.long() - 1
        batch = DecodeBatch(numbers, numbers, numbers, of.lens, of.tables)

        def work(
            of: AttentionInputs = of, batch: DecodeBatch = batch, memory: AttentionMemory = memory
        ) -> None:
            for keys, values in of.pages:
                kernels.attention(of.queries, keys, values, batch, memory, of.result)

        yield "attention (cuda)", rows, context, of.num_bytes, len(of.pages), work
