"""Compiles all Triton kernels at Mixtral's sizes for a GPU that is not here.

    TRITON_INTERPRET=0 python -m tests.model.kernels.compiled 90

Prints a line for each: shared memory and, for 4-bit weights, the instructions per weight of the
innermost loop with matrix products, where they have a budget. Fails where a kernel spills registers
or exceeds a budget. Arguments are written as in a launch: tensors by their type, other values as
they are.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from serve_app.model.kernels.triton import (
    grouped_product,
    nf4_decode,
    nf4_kernels,
    nf4_unpack,
    paged_attention,
    prompt_attention,
    prompt_routing,
    step_kernels,
)

CHANGING = ("tokens", "entries", "rows", "batch", "programs", "table_stride", "first")
"""Numbers that differ from step to step; a new one must not compile another variant."""
ANYWHERE = ("positions", "slots")
"""Tensors that begin at any number within another."""
Case = tuple[str, Any, dict[str, Any], dict[str, int], int]
"""Name, kernel, arguments, options of the launch, weights that a thread decodes in a round."""
MAX_SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
MAX_PER_WEIGHT = {80: 9.0, 90: 7.0, 120: 9.0}


def products(rows: int, columns: int, tile_rows: int) -> dict[str, Any]:
    """Arguments that all products share."""
    return {
        **{"packed": "*u8", "absmax": "*bf16", "code": "*bf16"},
        **dict.fromkeys(("low01", "low23", "high01", "high23"), "i64"),
        **{"HAS_PTX": True, "GROUPS": 2},
        **{"N": rows, "K": columns, "ROWS": tile_rows},
    }


def product_cases() -> list[Case]:
    cases: list[Case] = []
    routing = {"order": "*i32", "starts": "*i32"}
    for tile in (16, 32, 64):
        whole = {"x": "*bf16", "TILE": tile, "SPLIT_K": nf4_decode.SPLIT_K, "TOP_K": 2, **routing}
        for kernel, sizes, rows, more in (
            (nf4_kernels.gate_up_kernel, (28672, 4096), nf4_decode.GATE_UP_ROWS, {"out": "*bf16"}),
            (
                nf4_kernels.down_kernel,
                (4096, 14336),
                nf4_decode.rows_of(tile),
                {"out": "*fp32", "topk_weights": "*fp32", "entries": 32},
            ),
            (
                nf4_kernels.dense_kernel,
                (6144, 4096),
                nf4_decode.rows_of(tile),
                {"out": "*fp32", "tokens": 32},
            ),
        ):
            arguments = {**whole, **more, **products(*sizes, rows)}
            cases.append((f"tile {tile}", kernel, arguments, nf4_decode.shape_of(tile, rows), rows))
    unpack = {"indices": "*i64", "out": "*bf16", "SPAN": nf4_unpack.SPAN}
    unpack |= products(28672, 4096, nf4_unpack.ROWS)
    cases.append(("", nf4_unpack.unpack_kernel, unpack, {"num_warps": 4}, 0))
    return cases


def attention_cases() -> list[Case]:
    shape: dict[str, Any] = {
        "H": 32,
        "D": 128,
        "WINDOW": 0,
        "TILE": 64,
        "MAX_SPLITS": 32,
        "MIN_SPLIT": 128,
    }
    sums = {"lens": "*i32", "sums": "*fp32", "stats": "*fp32"}
    attend: dict[str, Any] = {
        **dict.fromkeys(("queries", "keys", "values"), "*bf16"),
        "tables": "*i32",
        **sums,
    }
    attend |= {"scale": 0.1, "table_stride": 2048, "K": 8, "G": 4, "ROWS": 16, "BLOCK": 16}
    attend |= {"programs": 4, **shape}
    combine: dict[str, Any] = {"out": "*bf16", **sums, **shape}
    return [
        ("Mixtral", paged_attention._attend, attend, {"num_warps": 4, "num_stages": 2}, 0),
        ("Mixtral", paged_attention._combine, combine, {"num_warps": 4}, 0),
    ]


def prompt_attention_cases(chip: int) -> list[Case]:
    sizes: dict[str, Any] = {"H": 32, "K": 8, "D": 128, "G": 4, "GROUP": 4, "QUERIES": 32}
    floats = {"sums": "*fp32", "stats": "*fp32", "out": "*bf16"}
    tile = prompt_attention.TILE if chip == 90 else prompt_attention.SMALL_TILE
    attend: dict[str, Any] = {
        **dict.fromkeys(("queries", "keys", "values"), "*bf16"),
        **dict.fromkeys(("tables", "items"), "*i32"),
        **{"scale": 0.1, "table_stride": 2048, "BLOCK": 16},
    }
    attend |= {**floats, **sizes, "TILE": tile}
    combine = {"combined": "*i32", **floats, **sizes}
    kernel, wide = prompt_attention._attend_chunks, {"num_warps": 8, "num_stages": 3}
    return [
        ("Mixtral", kernel, {**attend, "WINDOW": 0}, wide, 0),
        ("window", kernel, {**attend, "WINDOW": 4096}, wide, 0),
        ("Mixtral", prompt_attention._combine_splits, combine, {"num_warps": 2}, 0),
    ]


def prompt_product_cases(chip: int) -> list[Case]:
    """Products with the weights of all experts, and the routing of prompts."""
    shape = grouped_product.WIDE if chip == 90 else grouped_product.NARROW
    tensors = {**dict.fromkeys(("x", "weights", "out"), "*bf16"), "topk_weights": "*fp32"}
    routing = dict.fromkeys(("order", "starts"), "*i32")
    tile = {"ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth}
    common: dict[str, Any] = {**tensors, **routing, **tile, "first": 3, "programs": 999}
    common |= {"EXPERTS": 8, "WIDTH": 8, "TOP_K": 2, "BY_DESCRIPTOR": shape.by_descriptor}
    if shape.by_descriptor:
        common["weights"] = f"tensordesc<bf16[{shape.columns}, {shape.depth}]>"
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    routes: dict[str, Any] = {"logits": "*bf16", "topk_weights": "*fp32", "tokens": 4096}
    routes |= {**routing, "EXPERTS": 8, "WIDTH": 8, "TOP_K": 2, "ROWS": prompt_routing.ROWS}
    return [
        *(
            (name, grouped_product._grouped_product, {**common, **sizes}, options, 0)
            for name, sizes in (
                ("gate_up", {"IS_GATE_UP": True, "N": 28672, "K": 4096}),
                ("down", {"IS_GATE_UP": False, "N": 4096, "K": 14336}),
            )
        ),
        ("", prompt_routing._route_prompts, routes, {"num_warps": 8}, 0),
    ]


def step_cases() -> list[Case]:
    norm: dict[str, Any] = {**dict.fromkeys(("x", "weight", "y"), "*bf16"), "parts": "*fp32"}
    norm |= {"lens": "*i32", "rows": 32, "eps": 1e-5, "SIZE": 4096, "WIDTH": 4096}
    norm |= {"SPLITS": 2, "SUMMANDS": 2}
    rope: dict[str, Any] = {"qkv": "*fp32", "positions": "*i64", "slots": "*i64", "lens": "*i32"}
    rope |= dict.fromkeys(("cos", "sin", "queries", "keys", "values"), "*bf16")
    rope |= {"batch": 32, "SPLITS": 2, "H": 32, "K": 8, "D": 128}
    routes: dict[str, Any] = {"logits": "*bf16", "topk_weights": "*fp32", "rows": 128}
    routes |= {**dict.fromkeys(("lens", "order", "starts"), "*i32"), "EXPERTS": 8, "WIDTH": 8}
    routes["TOP_K"] = 2
    return [
        ("Mixtral", step_kernels._add_norm, norm, {"num_warps": 8}, 0),
        ("Mixtral", step_kernels._rope_write, rope, {"num_warps": 1}, 0),
        *(
            (f"{rows} rows", step_kernels._route, {**routes, "ROWS": rows}, {"num_warps": 4}, 0)
            for rows in (1, 2, 128)
        ),
    ]


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, int], chip: int) -> Any:
    signature, values, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = arguments[name]
        if parameter.is_constexpr:
            signature[name], values[(index,)] = "constexpr", value
            continue
        kind = {int: "i32", float: "fp32"}.get(type(value), value)
        signature[name] = kind
        if parameter.do_not_specialize or parameter.do_not_specialize_on_alignment:
            continue
        if kind[0] == "*" or (kind == "i32" and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def loop(listing: str) -> list[str]:
    """Returns the instructions of the shortest loop with matrix products."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
            back = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if back and back[1] in labels:
                loops.append(lines[labels[back[1]] :])
    return min((body for body in loops if any("MMA" in i for i in body)), key=len, default=[])


def about(cubin: bytes, tool: str, *options: str) -> str:
    """Returns what `tool`, one of CUDA's programs that come with Triton, prints about a compiled
    kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), *options, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout


def parameter_sizes(cubin: bytes) -> list[int]:
    """The bytes of each parameter of the one kernel of `cubin`, in their order."""
    pattern = r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x[0-9a-f]+\s+Size\s+: 0x([0-9a-f]+)"
    found = re.findall(pattern, about(cubin, "cuobjdump", "-elf"))
    return [int(size, 16) for _, size in sorted((int(n, 16), size) for n, size in found)]


def spills(cubin: bytes) -> bool:
    """Returns whether registers go to local memory, or anything else is kept there."""
    ((stack, local),) = re.findall(
        r"STACK:(\d+).* LOCAL:(\d+)", about(cubin, "cuobjdump", "-res-usage")
    )
    return (stack, local) != ("0", "0")


def instructions_per_weight(cubin: bytes, tile_rows: int, num_warps: int) -> float:
    """Instructions of the loop that decodes weights, per weight; 0 if no loop is found.

    A round decodes two blocks of 64, of each row of the tile, with all threads.
    """
    body = loop(about(cubin, "nvdisasm", "-c", "-ndf"))  # without an analysis that is not needed
    return len(body) / (2 * 64 * tile_rows / (32 * num_warps))


def main(chip: int) -> int:
    failures = []
    for name, kernel, arguments, options, tile_rows in (
        *product_cases(),
        *attention_cases(),
        *prompt_attention_cases(chip),
        *prompt_product_cases(chip),
        *step_cases(),
    ):
        module = kernel.__module__.rpartition(".")[2]
        what = f"{module}.{kernel.__name__} {name}"
        failures += [
            f"{what} is compiled anew for each {parameter.name}"
            for parameter in kernel.params
            if (parameter.name in CHANGING and not parameter.do_not_specialize)
            or (parameter.name in ANYWHERE and not parameter.do_not_specialize_on_alignment)
        ]
        binary = compiled(kernel, arguments, options, chip)
        cubin, shared = binary.asm["cubin"], binary.metadata.shared
        said = f"{what}: {shared} bytes shared"
        if spills(cubin):
            failures.append(f"{what} spills registers")
        if shared > MAX_SHARED[chip]:
            failures.append(f"{what} takes too much shared memory")
        if tile_rows and arguments["TILE"] == 16:
            per_weight = instructions_per_weight(cubin, tile_rows, options["num_warps"])
            said += f", {per_weight:.2f} instructions per weight"
            if not 0 < per_weight <= MAX_PER_WEIGHT[chip]:
                failures.append(f"{what}: {per_weight:.2f} instructions per weight")
        print(said)
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
