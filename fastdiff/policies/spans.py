"""Blocks as spans of frames and pixels, and static masks from the distance between them."""

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.layout import Grid, Tiling, TokenLayout, remembered
from fastdiff.policies.base import Context, Policy
from fastdiff.policies.partition import axis_product, block_size, blocks_of


@dataclass(frozen=True)
class Spans:
    """Grid blocks with the first and last frame and pixel of each; a pixel is a place in a frame.

    tiles: on the CPU. grid_blocks: the blocks that are no text. frames, pixels: int64 [blocks, 2],
    the last one included.
    """

    layout: TokenLayout
    tiles: Tiling
    grid_blocks: slice
    frames: Tensor
    pixels: Tensor

    def gap(self, spans: Tensor) -> Tensor:
        """Smallest distance between members of two spans, int64 [blocks, blocks]."""
        first, last = spans[:, 0], spans[:, 1]
        return torch.maximum(first[:, None] - last, first - last[:, None]).clamp_min(0)

    def order_gap(self, outer: Tensor, inner: Tensor, size: int) -> Tensor:
        """Smallest distance in an order of tokens, outer * size + inner, int64 [blocks, blocks]."""
        low, high = outer[:, 0] - outer[:, 1, None], outer[:, 1] - outer[:, 0, None]
        first, last = inner[:, 0] - inner[:, 1, None], inner[:, 1] - inner[:, 0, None]
        best = torch.full_like(low, 1 << 40)
        nearest = low.clamp_min(0) + high.clamp_max(0)
        for step in (-1, 0, 1):
            jump = (nearest + step).clamp(low, high) * size
            reach = torch.maximum(jump + first, -(jump + last)).clamp_min(0)
            best = torch.minimum(best, reach)
        return best

    def order_middle(self, outer: Tensor, inner: Tensor, size: int) -> Tensor:
        """Distance of the middles in that order, as a part of all tokens, [blocks, blocks]."""
        middle = outer.double().mean(1) * size + inner.double().mean(1)
        return (middle[:, None] - middle).abs() / (self.layout.grid_tokens + size)

    def whole(self, keep: Tensor) -> Tensor:
        """A map over grid blocks as one over all blocks, with all that is always kept."""
        tiles, grid = self.tiles, self.grid_blocks
        own = torch.eye(tiles.blocks, dtype=torch.bool)
        found = own | tiles.always | tiles.dense_rows[:, None]
        found[grid, grid] |= keep
        return found

    def nearest(self, distance: Tensor, density: float) -> Tensor:
        """`whole` of the nearest pairs of blocks, as many as come nearest to `density`."""
        share = self.tiles.lengths / self.tiles.lengths.sum()
        levels = distance.unique()
        low, high = 0, levels.numel() - 1
        found = {}
        while low <= high:
            middle = (low + high) // 2
            keep = self.whole(distance <= levels[middle])
            found[middle] = float((keep.float() @ share) @ share)
            low, high = (middle + 1, high) if found[middle] < density else (low, middle - 1)
        best = min(found, key=lambda i: abs(found[i] - density))
        return self.whole(distance <= levels[best])


class Cut(NamedTuple):
    """How a sequence is cut: tiles, and `lead` leading frames that every query keeps."""

    layout: TokenLayout
    tile: Grid
    lead: int
    device: torch.device


def leading_frames(sink: int | None, layout: TokenLayout, density: float) -> int:
    """The frames that `sink` keeps; None: the first, where that is a quarter of the density."""
    frames = layout.grid[0]
    if frames == 1:
        return 0
    return min(int(frames * density >= 4) if sink is None else sink, frames)


@remembered(64)
def cut_tiles(cut: Cut) -> Tiling:
    """The tiling of `spans_of`, on the device."""
    tiles = spans_of(cut).tiles
    moved = {f.name: getattr(tiles, f.name) for f in fields(tiles)}
    return replace(tiles, **{
        name: x.to(cut.device) for name, x in moved.items() if isinstance(x, Tensor)
    })


def strip(grid: Grid, size: int) -> Grid:
    """A tile of whole rows of one frame with about `size` tokens; parts of rows where too long."""
    _, height, width = grid
    if width > size:
        return (1, 1, math.ceil(width / math.ceil(width / size)))
    rows = min(height, max(1, round(size / width)))
    return (1, math.ceil(height / math.ceil(height / rows)), width)


class Strips(Policy):
    """A policy whose tiles are strips of rows of one frame, or `tile`."""

    def cut(self, layout: TokenLayout, query: Tensor) -> Cut:
        tile = self.tile or strip(layout.grid, block_size(layout, query))
        return Cut(layout, tile, leading_frames(self.sink, layout, self.density), query.device)

    def tiles(self, layout: TokenLayout, query: Tensor, context: Context) -> Tiling:
        return cut_tiles(self.cut(layout, query))


@remembered(64)
def spans_of(cut: Cut) -> Spans:
    """The grid cut into tiles, the leading frames into tiles of one frame."""
    layout, tile, lead = cut.layout, cut.tile, cut.lead
    _, height, width = layout.grid
    t, h, w = (torch.arange(n) for n in layout.grid)
    time = torch.where(t < lead, t, lead + (t - lead) // tile[0])
    ids = axis_product(time, h // tile[1], w // tile[2])
    _, ids = torch.unique(ids, return_inverse=True)
    blocks = int(ids.max()) + 1
    leading = torch.arange(ids.numel()) < lead * height * width
    text_block = int(torch.bincount(ids).max())
    tiles = blocks_of(layout, ids, text_block, torch.device("cpu"), always=leading)

    def ends(value: Tensor) -> Tensor:
        first = torch.full((blocks,), 1 << 40).scatter_reduce(0, ids, value, "amin")
        last = torch.zeros(blocks, dtype=torch.int64).scatter_reduce(0, ids, value, "amax")
        return torch.stack([first, last], 1)

    token = torch.arange(ids.numel())
    first = -(-layout.before // text_block)
    return Spans(layout, tiles, slice(first, first + blocks),
                 ends(token // (height * width)), ends(token % (height * width)))
