"""Radial attention: the window of pixels halves whenever the distance in time doubles."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.layout import Tiling, remembered
from fastdiff.method import check
from fastdiff.policies.base import Context
from fastdiff.policies.spans import Cut, Spans, Strips, cut_tiles, spans_of
from fastdiff.policies.static import Pattern, pattern


@dataclass(frozen=True, kw_only=True)
class Radial(Strips):
    """A static mask for clips: near frames see wide bands of pixels, far frames narrow ones.

    A query sees a key in a frame at distance d where their places in the frame, counted row by row,
    differ by less than width * frame / 2^floor(log2(d)), and d counts as 1 up to 1. Where that is
    less than one token, it sees its own place in as many of the frames as keeps the density. Tiles
    are strips of rows; a tile is kept where any of its pairs is. Text is always kept.

    width: the band in near frames as a share of a frame; the paper has 1.0. None: as many tiles as
        `density` says, in the order in which a growing band takes them.

    Source: arXiv 2506.19852. Cost: tokens * log(tokens) pairs, no scores at run time. Limits: the
    same mask for every head, layer and prompt; strips are wider than the finest bands; in a picture
    it is one band of rows.
    """

    name: ClassVar[str] = "radial"
    summary: ClassVar[str] = "static: bands of pixels that narrow with distance in time"

    tail: bool = False
    width: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width is None or self.width > 0, "width", self.width,
              "a share of a frame over 0; 1.0 is the paper's")

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        found = _pattern(self.cut(context.layout, query), self.width, self.density)
        return found.expand(query.shape[0], query.shape[2], tiles)


def radial_keep(spans: Spans, width: float | None, density: float) -> Tensor:
    """Which blocks see which, bool [N, N] with text. width: share of a frame, None for density."""
    time, place = spans.gap(spans.frames), spans.gap(spans.pixels)
    # the band in near frames, in tokens, from which on a pair is kept
    needed = _halvings(time) * (place + 1)
    plane = spans.layout.grid[1] * spans.layout.grid[2]
    if width is None:
        # many pairs of tiles need one band: those in near frames come first
        return spans.nearest(
            needed + spans.order_middle(spans.frames, spans.pixels, plane), density)
    band = width * plane
    keep = needed <= band
    # where the band is below one token: the same place, in every so many frames
    first, last = spans.frames[:, 0], spans.frames[:, 1]
    farthest = torch.maximum(last[:, None] - first, last - first[:, None])
    for distance in range(spans.layout.grid[0]):
        reach = int(_halvings(torch.tensor(distance)))
        if reach > band and distance % math.ceil(reach / band) == 0:
            keep |= (place == 0) & (time <= distance) & (distance <= farthest)
    return spans.whole(keep)


def _halvings(distance: Tensor) -> Tensor:
    """2^floor(log2(d)) of whole numbers, 1 below 2."""
    return 1 << distance.clamp_min(1).double().log2().floor().long()


@remembered(256)
def _pattern(cut: Cut, width: float | None, density: float) -> Pattern:
    keep = radial_keep(spans_of(cut), width, density)
    return pattern(keep.to(cut.device), cut_tiles(cut))
