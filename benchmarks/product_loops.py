"""The loops over K of the CUDA products, counted in machine code; needs no GPU.

    python -m benchmarks.product_loops

A kernel has a loop for a quarter, half, three quarters and all of its token tiles, and the device
chooses one for each expert. A loop's row says how many instructions it takes for a weight, and how
many cycles a warp needs at least for 1,000 weights: the sum of the stall counts which the compiler
writes into the control bits of each instruction (bits 105 to 108; Jia et al., "Dissecting the
NVIDIA Volta GPU Architecture via Microbenchmarking", 2018). Waiting for memory comes on top.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import Report, new_parser, say
from serve_app.model.kernels.cuda.compiler import Compiler
from serve_app.model.kernels.cuda.variants import (
    CAPABILITIES,
    DENSE,
    DOWN,
    GATE_UP,
    Card,
    Variant,
    macros,
    shared_bytes,
    variants,
)

SIZES = ((DENSE, 6144, 4096), (DENSE, 4096, 4096), (GATE_UP, 28672, 4096), (DOWN, 4096, 14336))
"""N and K of the products of Mixtral 8x7B."""
TOP_K = 2
STALL_SHIFT, STALL_MASK = 105 - 64, 15


@dataclass(frozen=True, order=True)
class Loop:
    """An innermost loop with matrix products."""

    products: int
    """Matrix instructions; each multiplies 8 weights of every lane by 8 tokens."""
    instructions: int
    cycles: int
    """Cycles of a warp, at least."""


def listing(cubin: bytes) -> str:
    """Returns the machine code with its bits, from the disassembler that comes with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-c", "-ndf", "-hex", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(text: str) -> list[Loop]:
    """Returns the innermost loops with matrix products of a `listing`, fewest products first."""
    code, cycles, labels = list[str](), list[int](), dict[str, int]()
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
        elif upper := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line):
            cycles.append(max(1, int(upper[1], 16) >> STALL_SHIFT & STALL_MASK))
    found: list[Loop] = []
    last = -1
    for end, each in enumerate(code):
        back = re.search(r"BRA.*\((\.L_x_\d+)\)", each)
        start = labels.get(back[1], end + 1) if back else end + 1
        products = sum("HMMA" in one for one in code[start : end + 1])
        if products and start > last:
            last = end
            found.append(Loop(products, end + 1 - start, sum(cycles[start : end + 1])))
    return sorted(found)


def row_of(
    compiler: Compiler, card: Card, product: str, columns: int, variant: Variant
) -> dict[str, Any]:
    """Compiles a product's kernel and counts its loops."""
    options = macros(variant, product, card, columns, TOP_K)
    found = loops(listing(compiler.cubin(variant.source, options)))
    weights = 8 * found[-1].products // variant.token_tiles  # of a lane, the same in every loop
    return {
        "capability": card.capability,
        "product": product,
        "token_tiles": variant.token_tiles,
        "threads": variant.threads,
        "blocks": variant.blocks_per_sm,
        "shared_bytes": shared_bytes(variant, card),
        "loops": [
            {
                "token_tiles": 8 * loop.products // weights,
                "instructions_per_weight": round(loop.instructions / weights, 2),
                "cycles_per_1000_weights": round(1000 * loop.cycles / weights / 32),
            }
            for loop in found
        ],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = new_parser(__doc__)
    parser.add_argument("--capabilities", type=int, nargs="+", default=list(CAPABILITIES))
    options = parser.parse_args(arguments)
    report = Report("product_loops", {"rows": []}, options.save)
    say("  card  product tiles   instructions a weight by tiles of the loop")
    for capability in options.capabilities:
        compiler, card = Compiler(capability), Card(capability, 1)
        report.figures["nvrtc"] = compiler.version
        for product, rows, columns in SIZES:
            for variant in dict.fromkeys(variants(product, card, rows).values()):
                row = row_of(compiler, card, product, columns, variant)
                row["out_features"] = rows
                report.figures["rows"].append(row)
                by_tiles = ", ".join(
                    f"{loop['token_tiles']}: {loop['instructions_per_weight']:.2f}"
                    for loop in row["loops"]
                )
                say(f"{capability:>6} {product:>8} {variant.token_tiles:>5}   {by_tiles}")
    report.publish()
    return 0


if __name__ == "__main__":
    sys.exit(main())
