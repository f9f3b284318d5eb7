"""Windows on a 3-D grid, and the boxes of queries and keys that waste the least on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Grid = tuple[int, int, int]
# of one axis: the first key of every coordinate, and the one after its last
Bounds = tuple[tuple[int, ...], tuple[int, ...]]
AXES = ("frames", "height", "width")
# what masking adds to the time of a tile
MASKING = 0.15


@dataclass(frozen=True)
class Window:
    """The window of every token of a grid; see `window_attention` for the meaning of each."""

    grid: Grid
    window: Grid
    stride: Grid = (1, 1, 1)
    causal: tuple[bool, bool, bool] = (False, False, False)

    def __post_init__(self) -> None:
        for name in ("grid", "window", "stride", "causal"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} must be (frames, height, width), "
                                 f"got {getattr(self, name)}")
        for axis, size, window, stride in zip(
                AXES, self.grid, self.window, self.stride, strict=True):
            if size < 1:
                raise ValueError(f"the grid {self.grid} has no {axis}")
            if not 1 <= window <= size:
                raise ValueError(f"window={window} is not possible on {axis} of the grid "
                                 f"{self.grid}: accepted is 1 to {size}")
            if not 1 <= stride <= window:
                raise ValueError(f"stride={stride} is not possible on {axis} with a window of "
                                 f"{window}: accepted is 1 to {window}")

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that count, text aside."""
        return math.prod(sum(high) - sum(low) for low, high in bounds(self))


@lru_cache(maxsize=256)
def bounds(window: Window) -> tuple[Bounds, Bounds, Bounds]:
    """Of each axis the first coordinate that each coordinate sees, and the one after the last.

    Neither ever falls along an axis; kernels rely on that.
    """
    axes = zip(window.grid, window.window, window.stride, window.causal, strict=True)
    t, h, w = (_axis(*axis) for axis in axes)
    return t, h, w


def _axis(size: int, window: int, stride: int, causal: bool) -> Bounds:
    low, high = [], []
    for i in range(size):
        leader = min(i // stride * stride + (stride - 1 if causal else stride // 2), size - 1)
        if causal:
            low.append(max(leader - window + 1, 0))
            high.append(i + 1)
        else:
            low.append(min(max(leader - window // 2, 0), size - window))
            high.append(low[-1] + window)
    return tuple(low), tuple(high)


@lru_cache(maxsize=64)
def table(window: Window, device: torch.device) -> tuple[Tensor, Tensor]:
    """`bounds` as two int32 [frames + height + width], the low ones and the high ones.

    Both start at a multiple of 16 bytes, for which kernels are compiled.
    """
    rows = [[n for axis in bounds(window) for n in axis[side]] for side in (0, 1)]
    rows = [row + [0] * (-len(row) % 4) for row in rows]
    low, high = torch.tensor(rows, dtype=torch.int32, device=device)
    return low, high


@dataclass(frozen=True)
class Boxes:
    """Sides of the boxes that queries and keys are cut into.

    tiles: boxes of queries on each axis. steps: boxes of keys that they walk in all. masked: how
    many of those need a mask.
    """

    query: Grid
    key: Grid
    tiles: Grid
    steps: int
    masked: int


@lru_cache(maxsize=256)
def boxes(window: Window, rows: int, columns: int) -> Boxes:
    """The boxes of `rows` queries and `columns` keys, sides powers of two, of the least work.

    A tile of queries walks the box that its windows cover, from its first corner on, in whole boxes
    of keys. How many on each axis does not depend on the other axes, so the best are soon found.
    """
    known: dict[tuple[int, int, int], tuple[int, int]] = {}
    best, found = math.inf, None
    for query in _sides(rows, window.grid):
        for key in _sides(columns, window.grid):
            steps = whole = 1
            for i, sides in enumerate(zip(query, key, strict=True)):
                if (i, *sides) not in known:
                    known[i, *sides] = _steps(*bounds(window)[i], *sides)
                steps *= known[i, *sides][0]
                whole *= known[i, *sides][1]
            cost = steps + MASKING * (steps - whole)
            if cost < best:
                tiles = [-(-n // side) for n, side in zip(window.grid, query, strict=True)]
                best, found = cost, Boxes(query, key, (tiles[0], tiles[1], tiles[2]), steps,
                                          steps - whole)
    assert found is not None
    return found


def _steps(
    low: tuple[int, ...], high: tuple[int, ...], query: int, key: int
) -> tuple[int, int]:
    """Of one axis: the key boxes that all query boxes walk, and those that need no mask."""
    steps = whole = 0
    for first in range(0, len(low), query):
        last = min(first + query, len(low)) - 1
        n = -(-(high[last] - low[first]) // key)
        steps += n
        # box j holds low[first] + j * key and what follows
        begin = -(-(low[last] - low[first]) // key)
        whole += max(0, (high[first] - low[first]) // key - begin)
    return steps, whole


def _sides(volume: int, grid: Grid) -> Iterator[Grid]:
    """Boxes of so many tokens; a side outgrows its axis only where all must."""
    longest = [1 << (n - 1).bit_length() for n in grid]
    if math.prod(longest) < volume:
        # the last axis takes what is left over
        longest[2] = volume
    t = 1
    while t <= min(volume, longest[0]):
        h = 1
        while h <= min(volume // t, longest[1]):
            if volume // (t * h) <= longest[2]:
                yield t, h, volume // (t * h)
            h *= 2
        t *= 2
