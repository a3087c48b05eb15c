"""PTX for Triton's inline assembly that turns 4-bit codes into 16-bit floats in registers.

The 16 code values have 16 bits each, which are stored in two planes: the 16 low bytes and the 16
high bytes. The instruction `prmt` selects four of eight bytes by the low 3 bits of four nibbles. So
one `prmt` looks four codes up in the first half of a plane, a second one in the other half, and a
third one selects between the two results by the highest bit of each code. Both planes together give
four values. This needs no memory access, and 2.8 integer instructions per weight.

Example: code 10 (binary 1010). The first `prmt` returns byte 2 of values 0 to 7, the second one
byte 2 of values 8 to 15, which is that of value 10. The highest bit is 1, so the third one selects
the second result.
"""

import struct
from collections.abc import Sequence

LOW, HIGH = ("$5", "$9", "$13", "$17"), ("$21", "$25", "$29", "$33")
"""The operands with the words of the low plane and of the high plane. Triton passes each word four
times, once per packed byte, so their numbers differ by 4."""
CONSTRAINTS = ",".join(["=&r"] * 4 + ["r"] * 33)
"""The operands: 4 results, then 33 inputs, which are the packed bytes and the words of the planes.
The results are two registers with the values of the bytes' high nibbles, two values each, and two
with those of the low nibbles. `&` keeps a result from sharing a register with an input, because
results are written before all inputs are read."""


def _decode() -> str:
    lines = [".reg .b32 t, s, a, b, l, h;"]
    for half in (0, 1):
        lines.append("shr.u32 t, t, 16;" if half else "and.b32 t, $4, 0x77777777;")
        # Nibble i of the selector is i for byte i of the first result, i + 4 for the second one.
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
"""The assembly that decodes eight codes. `$4` has four packed bytes; `$0` to `$3` get the values.
"""


def planes(code: Sequence[float], *, is_bfloat16: bool) -> dict[str, int]:
    """Returns the planes of the 16 values in `code`, rounded to bfloat16 or float16.

    `low01` and `low23` are the words 0 to 3 of the low plane, two words of 32 bits per int with the
    first word in the low half; `high01` and `high23` are the words of the high plane.
    """
    values = [bits16(value, is_bfloat16=is_bfloat16) for value in code]
    plane_bytes = bytes([value & 0xFF for value in values] + [value >> 8 for value in values])
    return dict(
        zip(("low01", "low23", "high01", "high23"), struct.unpack("<4q", plane_bytes), strict=True)
    )


def bits16(value: float, *, is_bfloat16: bool) -> int:
    """Returns the bits of `value` as a bfloat16 or float16, rounded to nearest, ties to even."""
    if not is_bfloat16:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
