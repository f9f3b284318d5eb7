"""What the Hopper kernels share, in Gluon; importing this file imports triton."""

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["LOWEST", "NOTHING", "exp2", "left", "row_sum", "shift", "take"]

# stands for minus infinity, and what no real score falls below
LOWEST = gl.constexpr(-1e30)
NOTHING = gl.constexpr(-1e20)


# 2^f on [-1/2, 1/2] by f^4 to f and exactly 1: the least relative error, 3e-6; of third degree it
# would be 1e-4, too much for the log of a row with few keys
SERIES = (
    0.009582852944731712, 0.055906426161527634, 0.24024099111557007, 0.6931241750717163, 1.0)
TOGETHER = 8


def _assembly() -> str:
    """PTX that raises 2 to TOGETHER numbers, the first by a polynomial.

    x = n + f, n the nearest integer: adding 1.5 * 2^23 leaves it in the low bits of the sum. The
    series of f times 2^n is an addition to its exponent. From -127 down the result is exactly zero.
    """
    lowest, magic, *series = ("0f" + struct.pack(">f", x).hex().upper()
                              for x in (-127.0, 12582912.0, *SERIES))
    first = f"""{{
        .reg .f32 x, f, p; .reg .b32 n, b;
        max.ftz.NaN.f32 x, ${TOGETHER}, {lowest};
        add.rn.ftz.f32 p, x, {magic};
        mov.b32 n, p;
        sub.rn.ftz.f32 p, p, {magic};
        sub.rn.ftz.f32 f, x, p;
        mov.f32 p, {series[0]};
        {" ".join(f"fma.rn.ftz.f32 p, p, f, {a};" for a in series[1:])}
        mov.b32 b, p;
        shl.b32 n, n, 23;
        add.s32 n, n, b;
        mov.b32 $0, n;
    }}"""
    rest = (f"ex2.approx.ftz.f32 ${i}, ${i + TOGETHER};" for i in range(1, TOGETHER))
    return "\n".join((first, *rest))


ASSEMBLY = gl.constexpr(_assembly())
OPERANDS = gl.constexpr(",".join(["=f"] * TOGETHER + ["f"] * TOGETHER))
PACK = gl.constexpr(TOGETHER)


@gluon.jit
def exp2(x, POLYNOMIAL: gl.constexpr):
    """2^x for x of at most 0. POLYNOMIAL: every eighth without the special function unit, which at
    D = 64 is as busy as the tensor cores."""
    if POLYNOMIAL:
        return gl.inline_asm_elementwise(ASSEMBLY, OPERANDS, [x], gl.float32, True, PACK)
    else:
        return gl.exp2(x)


@gluon.jit
def shift(m, GUARD: gl.constexpr):
    """What to take off the scores; a row that has seen no key yet keeps exp2(LOWEST) at zero."""
    if GUARD:
        return gl.where(m > NOTHING, m, 0.0)
    else:
        return m


@gluon.jit
def row_sum(p, BN: gl.constexpr):
    """Sums over the columns that a thread owns, [64, 4]: no shuffles until the very end."""
    return gl.sum(gl.sum(p.reshape([64, BN // 8, 4, 2]), 3), 1)


@gluon.jit
def left(box):
    """A number that the producer left, known to every thread of a warpgroup."""
    return gl.max(box.load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def take(taken, WORK):
    """The next work item: whoever is done takes one, since rows differ in length."""
    number = gl.atomic_add(taken, 1)
    # as many are taken as there are items, the last ones in vain: left as it was found
    gl.store(taken, 0, mask=number == WORK - 1)
    return gl.num_programs(0) + number
