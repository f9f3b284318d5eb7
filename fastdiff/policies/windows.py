"""Windows of neighborhood attention along one axis, and the blocks and tiles that follow."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """The keys that each place of an axis sees.

    Places of one dilation group stand together: place u is coordinate `coordinate[u]`. It sees the
    places low[u] to high[u] - 1, all of its group; neither ever falls. All int64 [size].
    """

    coordinate: Tensor
    low: Tensor
    high: Tensor

    @property
    def size(self) -> int:
        return self.coordinate.numel()

    @property
    def pairs(self) -> int:
        return int((self.high - self.low).sum())


def axis(size: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Axis:
    """Windows of `window` keys on an axis of `size` tokens, as NATTEN defines them.

    Every query sees exactly `window` keys: windows shift inward at borders. `stride` neighbours
    share the window of the middle one (the right of two). dilation: the keys of a window are as far
    apart, and each remainder is an axis of its own. causal: the window ends at the query, the group
    of `stride` neighbours shares its begin, and there may be fewer keys.
    """
    coordinate, low, high = [], [], []
    for remainder in range(dilation):
        place = torch.arange(-(-(size - remainder) // dilation))
        length, base = place.numel(), sum(x.numel() for x in coordinate)
        if causal:
            leader = (place // stride * stride + stride - 1).clamp(max=length - 1)
            first, last = (leader - window + 1).clamp(min=0), place + 1
        else:
            leader = (place // stride * stride + stride // 2).clamp(max=length - 1)
            first = (leader - window // 2).clamp(min=0)
            first = torch.where(leader + window // 2 + window % 2 > length, length - window, first)
            last = first + window
        coordinate.append(place * dilation + remainder)
        low.append(first + base)
        high.append(last + base)
    return Axis(torch.cat(coordinate), torch.cat(low), torch.cat(high))


def cut_blocks(axis: Axis, most: int, lead: int = 0) -> tuple[Tensor, Tensor]:
    """Blocks of an axis that no window cuts: whole or not at all.

    most: longest block. lead: the first so many coordinates get blocks of their own. Returns the
    block of each coordinate, int64 [size], and which block sees which, bool [blocks, blocks].
    """
    cut = torch.zeros(axis.size + 1, dtype=torch.bool)
    cut[0] = True
    cut[axis.low] = True
    cut[axis.high] = True
    leading = axis.coordinate < lead
    for x in (axis.low, axis.high, leading.long()):
        cut[1:-1] |= x.diff() != 0
    edges = cut[:-1].nonzero()[:, 0].tolist() + [axis.size]
    starts = []
    for begin, end in zip(edges, edges[1:], strict=False):
        parts = math.ceil((end - begin) / most)
        starts += [begin + (end - begin) * i // parts for i in range(parts)]
    start = torch.tensor(starts)
    end = torch.cat([start[1:], torch.tensor([axis.size])])
    block = torch.empty(axis.size, dtype=torch.int64)
    block[axis.coordinate] = torch.repeat_interleave(torch.arange(len(starts)), end - start)
    low, high = axis.low[start, None], axis.high[start, None]
    return block, (low <= start) & (end <= high)


@dataclass(frozen=True)
class AxisTiles:
    """Query tiles of an axis and the run of keys that each touches.

    query: int64 [tiles, Q] and key: int64 [tiles, K], coordinates; short tiles repeat a query.
    sees: bool [tiles, Q, K]. slot: int64 [size], tile * Q + position of each coordinate.
    """

    query: Tensor
    key: Tensor
    sees: Tensor
    slot: Tensor

    def to(self, device: torch.device) -> "AxisTiles":
        return AxisTiles(*(x.to(device) for x in (self.query, self.key, self.sees, self.slot)))


def cut_tiles(axis: Axis, most: int) -> AxisTiles:
    """Tiles of at most `most` queries that stay inside a dilation group."""
    # where the remainder changes, the coordinate falls
    falls = (axis.coordinate.diff() < 0).nonzero()[:, 0] + 1
    edges = [0, *falls.tolist(), axis.size]
    starts, ends = [], []
    for begin, end in zip(edges, edges[1:], strict=False):
        parts = math.ceil((end - begin) / most)
        starts += [begin + (end - begin) * i // parts for i in range(parts)]
        ends += [begin + (end - begin) * (i + 1) // parts for i in range(parts)]
    start, end = torch.tensor(starts), torch.tensor(ends)
    width = int((end - start).max())
    place = (start[:, None] + torch.arange(width)).minimum(end[:, None] - 1)
    reach = axis.low[start]
    keys = reach[:, None] + torch.arange(int((axis.high[end - 1] - reach).max()))
    low, high = axis.low[place][..., None], axis.high[place][..., None]
    sees = (low <= keys[:, None]) & (keys[:, None] < high)
    slot = torch.empty(axis.size, dtype=torch.int64)
    tile = torch.repeat_interleave(torch.arange(len(starts)), end - start)
    slot[axis.coordinate] = tile * width + torch.arange(axis.size) - start[tile]
    keys = keys.clamp(max=axis.size - 1)
    return AxisTiles(axis.coordinate[place], axis.coordinate[keys], sees, slot)
