"""The assembly that decodes 4-bit codes, executed by a small interpreter in this file."""

import random
from collections.abc import Callable

import pytest
import torch

from serve_app.model.kernels.triton.nf4_ptx import CONSTRAINTS, DECODE, bits16, planes
from serve_app.model.quantize import code_values

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX's `prmt` in its default mode."""
    table = (a | b << 32).to_bytes(8, "little")
    picked = []
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = table[nibble & 7]
        picked.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(picked), "little")


OPERATIONS: dict[str, Callable[..., int]] = {
    "prmt.b32": prmt,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
}


def execute(word: int, tables: dict[str, int]) -> list[int]:
    """Registers $0 to $3 after the assembly has seen `word`."""
    words = [table >> shift & MASK for table in tables.values() for shift in (0, 32)]
    registers = {"$4": word}
    registers |= {f"${5 + i}": words[i // 4] for i in range(32)}
    for line in DECODE.strip("{} ").split(";")[1:-1]:
        name, rest = line.split(maxsplit=1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = OPERATIONS[name](*values) & MASK
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_code_becomes_its_value(quant_type: str, dtype: torch.dtype) -> None:
    """High nibbles first, then low ones, in the order of bytes, with the bits torch gives them."""
    values = code_values("nf4" if quant_type == "nf4" else "fp4")
    tables = planes(values.tolist(), is_bfloat16=dtype == torch.bfloat16)
    rng = random.Random(0)
    words = [*(0x11111111 * i for i in range(16)), *(rng.getrandbits(32) for _ in range(200))]
    rounded = values.to(dtype).view(torch.uint16).tolist()
    for word in words:
        nibbles = [word >> 4 * i & 15 for i in range(8)]
        expected = [rounded[n] for n in (*nibbles[1::2], *nibbles[::2])]
        found = [r >> shift & 0xFFFF for r in execute(word, tables) for shift in (0, 16)]
        assert found == expected


def test_rounding_is_torchs() -> None:
    """Numbers are rounded to the nearest, ties to even."""
    for value in torch.randn(500, generator=torch.Generator().manual_seed(0)).tolist():
        for dtype in (torch.bfloat16, torch.float16):
            expected = torch.tensor(value).to(dtype).view(torch.uint16).item()
            assert bits16(value, is_bfloat16=dtype == torch.bfloat16) == expected


def test_every_operand_has_a_constraint() -> None:
    """The constraints name 4 results, the packed bytes, and 8 words four times."""
    assert len(CONSTRAINTS.split(",")) == 4 + 1 + 8 * 4
