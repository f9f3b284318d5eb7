"""What the Hopper kernels share, in Gluon; importing this file imports triton."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["LOWEST", "NOTHING", "left", "row_sum", "shift", "take"]

# stands for minus infinity, and what no real score falls below
LOWEST = gl.constexpr(-1e30)
NOTHING = gl.constexpr(-1e20)


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
