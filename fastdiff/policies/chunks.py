"""Chunks of VMoBA: large groups of grid tokens that are chosen as one, cut into kernel blocks."""

import math
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fastdiff.layout import Grid, Tiling, TokenLayout, auto_tile, remembered
from fastdiff.policies.partition import axis_product, blocks_of
from fastdiff.policies.static import Pattern, pattern

# frames may be a fraction: runs of tokens in raster order, as the paper's temporal chunks
Box = tuple[int | float, int, int]


@dataclass(frozen=True)
class Chunks:
    """A tiling in which every chunk is a run of blocks.

    lengths: tokens of each chunk, on the host; sizes: float32 [C], the same on the device.
    grid_blocks: the blocks that are no text. of_block: int64, chunk of each of these. of_token:
    int64 [grid tokens], chunk of each grid token in tile order. first, count: int32 [C], the blocks
    of each chunk; longest: most blocks of a chunk. own: what a query block always sees, its own
    chunk and text; a text query sees everything.
    """

    layout: TokenLayout
    tiles: Tiling
    lengths: tuple[int, ...]
    sizes: Tensor
    grid_blocks: slice
    of_block: Tensor
    of_token: Tensor
    first: Tensor
    count: Tensor
    longest: int
    own: Pattern

    @property
    def grid(self) -> slice:
        """Grid tokens in tile order."""
        return slice(self.layout.before, self.layout.before + self.layout.grid_tokens)


@remembered(64)
def chunks_of(
    layout: TokenLayout, box: Box, tile: Grid | None, size: int, device: torch.device
) -> Chunks:
    """Cut the grid into chunks of `box` (frames, height, width) tokens; border chunks are shorter.

    tile: kernel blocks inside a chunk, None for about `size` tokens. The order of tokens inside a
    chunk changes nothing.
    """
    frames, height, width = layout.grid
    if float(box[0]).is_integer():
        sides = [min(int(b), n) for b, n in zip(box, layout.grid, strict=True)]
        inner = [min(t, s) for t, s in zip(tile or _tile(sides, size), sides, strict=True)]
        places = [torch.arange(n) for n in layout.grid]
        chunk = axis_product(*(p // s for p, s in zip(places, sides, strict=True)))
        block = axis_product(*(p % s // i for p, s, i in zip(places, sides, inner, strict=True)))
    else:
        run = max(1, int(box[0] * height * width))
        token = torch.arange(frames * height * width)
        chunk, block = token // run, token % run // size
    blocks = int(block.max()) + 1
    ids = chunk * blocks + block
    text_block = int(torch.bincount(ids).max())
    tiles = blocks_of(layout, ids, text_block, torch.device("cpu"))
    of_block = torch.unique(ids) // blocks
    lead = -(-layout.before // text_block)
    grid_blocks = slice(lead, lead + of_block.numel())
    lengths, count = torch.bincount(chunk), torch.bincount(of_block)
    keep = tiles.always | tiles.dense_rows[:, None]
    keep[grid_blocks, grid_blocks] = of_block[:, None] == of_block
    if device.type != "cpu":
        tiles = blocks_of(layout, ids, text_block, device)
    return Chunks(
        layout, tiles, tuple(lengths.tolist()),
        sizes=lengths.float().to(device),
        grid_blocks=grid_blocks,
        of_block=of_block.to(device),
        of_token=torch.repeat_interleave(torch.arange(lengths.numel()), lengths).to(device),
        first=(count.cumsum(0) - count + lead).int().to(device),
        count=count.int().to(device),
        longest=int(count.max()),
        own=pattern(keep.to(device), tiles),
    )


def chunk_means(key: Tensor, chunks: Chunks) -> Tensor:
    """Mean key of every chunk, float32 (float64 stays) [B, Hk, C, D]; key: tile order."""
    key = key[:, chunks.grid]
    precision = torch.promote_types(key.dtype, torch.float32)
    parts, begin = [], 0
    # chunks of one length stand together, so a few views cover them all
    for length, run in groupby(chunks.lengths):
        end = begin + length * len(list(run))
        parts.append(key[:, begin:end].unflatten(1, (-1, length)).mean(2, dtype=precision))
        begin = end
    return torch.cat(parts, dim=1).transpose(1, 2)


def auto_box(grid: Grid, axes: int) -> Box:
    """A chunk for a partition of 1, 2 or 3 axes; about 7, 30 and 72 chunks, as in the paper."""
    frames, height, width = grid
    if axes == 1:
        return (math.ceil(frames / 7) if frames >= 7 else frames / 7, height, width)
    if axes == 2:
        _, ch, cw = auto_tile((1, height, width), math.ceil(height * width / 30))
        return (frames, ch, cw)
    return auto_tile(grid, math.ceil(math.prod(grid) / 72))


def _tile(sides: list[int], size: int) -> Grid:
    return auto_tile((sides[0], sides[1], sides[2]), size)
