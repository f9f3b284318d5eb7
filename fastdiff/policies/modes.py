"""The five static modes of Sparse-vDiT as block lists; any head may have any mode."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastdiff.blockmask import ListedMask
from fastdiff.layout import Grid, TokenLayout, remembered, tiling

FULL, SKIP, DIAGONAL, MULTI, STRIPES = MODES = "fsdmv"


@dataclass(frozen=True)
class Patterns:
    """The blocks of one layout, and what the modes keep of them.

    keep: bool [4, N, N], indices: int32 [4, N, N], counts: int32 [4, N], kept: float32 [4]; one
    each of full, skip, diagonal, multi-diagonal. share: float32 [N], part of the tokens in each
    block. text: bool [N]. always: bool [N], key blocks of text and of the first frames.
    bands: half widths of the two diagonals in blocks. longest: longest list of each of the four.
    grid_blocks: blocks that hold latent tokens. width: density that they were made for.
    """

    offsets: Tensor
    block: int
    keep: Tensor
    indices: Tensor
    counts: Tensor
    kept: Tensor
    share: Tensor
    text: Tensor
    always: Tensor
    bands: tuple[int, int]
    longest: tuple[int, ...]
    grid_blocks: int
    width: float

    @property
    def blocks(self) -> int:
        return self.share.numel()

    def of_grid(self, chosen: Tensor) -> Tensor:
        """Blocks of the grid, bool [grid_blocks], as blocks of the sequence, bool [N]."""
        return torch.zeros_like(self.text).masked_scatter(~self.text, chosen)

    def stripes(self, order: Tensor) -> Tensor:
        """The first blocks of `order` that fit into the width, as bool [N]; one at least."""
        order = order[~self.always[order]]
        text = self.share[self.text].sum()
        forced = text + (1 - text) * self.share[self.always].sum()
        grows = forced + (1 - text) * self.share[order].cumsum(0)
        least = 0 if bool(self.always.any()) else 1
        keep = torch.zeros_like(self.text)
        keep[order[: max(least, int((grows <= self.width + 1e-6).sum()))]] = True
        return keep

    @cached_property
    @torch.inference_mode(False)
    def even(self) -> Tensor:
        """Evenly spaced blocks of the grid, as many as fit into the width; bool [N]."""
        grid = (~self.always).nonzero()[:, 0]
        count = int(self.stripes(grid).sum())
        place = (torch.arange(count, device=grid.device).double() + 0.5)
        place = place * grid.numel() / max(1, count)
        keep = torch.zeros_like(self.text)
        keep[grid[place.long()]] = True
        return keep


@remembered(8)
def patterns(
    layout: TokenLayout, tile: Grid, sink: int, width: float, device: torch.device
) -> Patterns:
    """Full, skip, diagonal and multi-diagonal for tiles of one frame each.

    Blocks are numbered frame by frame. The diagonal keeps |i - j| < band over these numbers. The
    multi-diagonal keeps the same over the numbers that the blocks have when they are ordered by
    their place in the frame first and by frame second. Each band is the widest whose density is at
    most `width`, text and the first `sink` frames included.
    """
    tiles = tiling(layout, tile, 0, device)
    frames, cells = layout.grid[0], _cells(layout, tile)
    share = (tiles.lengths / tiles.lengths.sum()).double()
    text = tiles.dense_rows
    place = (~text).cumsum(0) - 1
    frame, cell = place // cells, place % cells
    always = text | (frame < sink) if frames > 1 else text.clone()
    full = torch.ones(tiles.blocks, tiles.blocks, dtype=torch.bool, device=device)
    bands, kept = [], [full, ~full]
    for number in (place, cell * frames + frame):
        far = (number[:, None] - number).abs()
        free = ~(text[:, None] | always)
        weight = torch.where(free, share[:, None] * share, 0)
        by_far = torch.bincount(far[free], weight[free], minlength=tiles.blocks)
        grows = 1 - weight.sum() + by_far.cumsum(0)
        bands.append(max(1, int((grows <= width + 1e-6).sum())))
        kept.append(~free | (far < bands[-1]))
    keep = torch.stack(kept)
    counts = keep.sum(-1, dtype=torch.int32)
    return Patterns(
        offsets=tiles.offsets, block=tiles.block, keep=keep,
        indices=torch.argsort(~keep, dim=-1, stable=True).to(torch.int32), counts=counts,
        kept=((keep.double() @ share) @ share).float(), share=share.float(), text=text,
        always=always, bands=(bands[0], bands[1]), longest=tuple(counts.amax(1).tolist()),
        grid_blocks=frames * cells, width=width,
    )


def mode_mask(
    modes: str, stripes: tuple[Tensor, ...], found: Patterns, batch: int
) -> ListedMask:
    """One mask for heads of mixed modes, a letter of `modes` each.

    stripes: for each head with mode "v", in order, the blocks that all its queries keep, bool [N].
    """
    device = found.keep.device
    which = _numbers(modes, device)
    keep, counts, kept = found.keep[which], found.counts[which], found.kept[which]
    indices = found.indices[which]
    # cut to the longest list, known without asking the device
    longest = max(found.blocks if m == STRIPES else found.longest[MODES.index(m)] for m in modes)
    everything = torch.arange(found.blocks, dtype=torch.int32, device=device)
    heads = [i for i, mode in enumerate(modes) if mode == STRIPES]
    for head, columns in zip(heads, stripes, strict=True):
        columns = columns | found.always
        row = torch.argsort(~columns, stable=True).to(torch.int32)
        keep[head] = columns | found.text[:, None]
        indices[head] = torch.where(found.text[:, None], everything, row)
        counts[head] = keep[head].sum(-1, dtype=torch.int32)
        kept[head] = (keep[head].float() @ found.share) @ found.share
    spread = (batch, -1, -1, -1)
    return ListedMask(
        keep.expand(spread), found.offsets, found.block,
        indices[..., : max(1, longest)].expand(spread), counts.expand(spread[:3]), kept.mean(),
    )


@remembered(4096)
def _numbers(modes: str, device: torch.device) -> Tensor:
    # a head with stripes starts as skipped and is then filled in
    found = [MODES.index(SKIP if mode == STRIPES else mode) for mode in modes]
    return torch.tensor(found, device=device)


@remembered(4096)
def from_bits(bits: str, blocks: int, device: torch.device) -> Tensor:
    """A set of blocks, bool [N], from the hexadecimal number of a plan."""
    number = int(bits, 16)
    return torch.tensor([bool(number >> i & 1) for i in range(blocks)], device=device)


def to_bits(blocks: Tensor) -> str:
    """The hexadecimal number of a set of blocks."""
    return f"{sum(1 << i for i in blocks.nonzero()[:, 0].tolist()):x}"


def _cells(layout: TokenLayout, tile: Grid) -> int:
    return math.ceil(layout.grid[1] / tile[1]) * math.ceil(layout.grid[2] / tile[2])
