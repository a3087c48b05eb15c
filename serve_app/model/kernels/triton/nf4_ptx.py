"""PTX for Triton's inline assembly that turns 4-bit codes into 16-bit floats in registers.

`prmt` picks four bytes of eight by four nibbles, so two of them and a third that chooses between
their results look four codes up in one byte plane of the sixteen values. Two planes make the 16
bits. That takes no look-up in memory, and 2.8 integer operations per weight.
"""

import struct
from collections.abc import Sequence

LOW, HIGH = ("$5", "$9", "$13", "$17"), ("$21", "$25", "$29", "$33")
"""Operands with the eight words of `planes`, four times each: once for every packed byte."""
CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 33)
"""Four bytes and the planes in; out come the values of the bytes' high nibbles, two registers of
two, then those of the low nibbles. `&`: results are written while operands are still to be read,
so no two may share a register."""


def _decode() -> str:
    lines = [".reg .b32 t, s, a, b, l, h;"]
    for half in (0, 1):
        lines.append("shr.u32 t, t, 16;" if half else "and.b32 t, $4, 0x77777777;")
        # Nibble i of the selector: byte i of the first result, or of the second.
        lines += [f"shr.u32 s, $4, {1 + 16 * half};", "and.b32 s, s, 0x4444;"]
        lines.append("or.b32 s, s, 0x3210;")
        for plane, result in ((LOW, "l"), (HIGH, "h")):
            lines += [
                f"prmt.b32 a, {plane[0]}, {plane[1]}, t;",
                f"prmt.b32 b, {plane[2]}, {plane[3]}, t;",
                f"prmt.b32 {result}, a, b, s;",
            ]
        lines += [f"prmt.b32 ${half}, l, h, 0x7351;", f"prmt.b32 ${2 + half}, l, h, 0x6240;"]
    return "{ " + " ".join(lines) + " }"


DECODE = _decode()
"""The assembly that looks eight codes up: `$4` is four bytes, `$0` to `$3` are the values."""


def planes(code: Sequence[float], *, is_bfloat16: bool) -> dict[str, int]:
    """The bytes of 16 values by significance: `low01`, `low23`, `high01`, `high23`, 64 bits each.

    Each is two words for the assembly, the first in the low half. Values are rounded to bfloat16 or
    float16.
    """
    values = [bits16(value, is_bfloat16=is_bfloat16) for value in code]
    both = bytes([value & 0xFF for value in values] + [value >> 8 for value in values])
    return dict(
        zip(("low01", "low23", "high01", "high23"), struct.unpack("<4q", both), strict=True)
    )


def bits16(value: float, *, is_bfloat16: bool) -> int:
    """A number as bfloat16 or float16, to the nearest, ties to even."""
    if not is_bfloat16:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
