"""Bands: a head sees near frames, or the same pixels in all frames, whichever suits it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.layout import Tiling, remembered
from fastdiff.method import check
from fastdiff.policies.base import Context
from fastdiff.policies.modes import ListedMask
from fastdiff.policies.spans import Cut, Spans, Strips, cut_tiles, spans_of
from fastdiff.policies.static import Pattern, pattern

BANDS = ("frames", "pixels")
# scores held at a time where heads are judged
SCORES = 1 << 26


@dataclass(frozen=True, kw_only=True)
class Bands(Strips):
    """Two static bands, as in Sparse VideoGen: near frames, or near pixels over all frames.

    "frames" keeps pairs that are near in the order frame by frame, "pixels" pairs that are near in
    the order pixel by pixel, frames innermost. Tiles are strips of rows; a tile is kept where any
    of its pairs is. Text is always kept.

    band: "frames", "pixels", or "auto": each head of each sample takes the band that holds more of
        the attention of a few queries.
    width: half width of both bands in frames' worth of tokens. None: each takes as many tiles as
        `density` says, nearest first.
    samples: queries that judge the bands for "auto".

    Source: arXiv 2502.01776, whose judge compares outputs; ours compares attention mass. Cost: no
    scores for a fixed band, samples * tokens scores a head for "auto". Limits: two shapes for all
    that heads do; a pixel band is at least a strip of rows high; in a picture both are rows.
    """

    name: ClassVar[str] = "bands"
    summary: ClassVar[str] = "static: near frames, or near pixels of all frames, by head"

    tail: bool = False
    band: str = "auto"
    width: float | None = None
    samples: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = ("auto", *BANDS)
        check(self.band in accepted, "band", self.band, f"one of {', '.join(accepted)}")
        check(self.width is None or self.width > 0, "width", self.width, "frames over 0")
        check(self.samples >= 1, "samples", self.samples, "1 or more")

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        pair = _patterns(self.cut(context.layout, query), self.width, self.density)
        batch, heads = query.shape[0], query.shape[2]
        if self.band != "auto":
            return pair[BANDS.index(self.band)].expand(batch, heads, tiles)
        frames, pixels = (_held(query, key, tiles, one, self.samples) for one in pair)
        return _mixed(pair, frames >= pixels, tiles)


def band_keep(spans: Spans, band: str, width: float | None, density: float) -> Tensor:
    """Which blocks see which, bool [N, N] with text."""
    frames, plane = spans.layout.grid[0], spans.layout.grid[1] * spans.layout.grid[2]
    if band == "frames":
        order = (spans.frames, spans.pixels, plane)
    else:
        order = (spans.pixels, spans.frames, frames)
    distance = spans.order_gap(*order)
    if width is not None:
        return spans.whole(distance < width * plane)
    return spans.nearest(distance + spans.order_middle(*order), density)


@remembered(256)
def _patterns(cut: Cut, width: float | None, density: float) -> tuple[Pattern, Pattern]:
    spans, tiles = spans_of(cut), cut_tiles(cut)
    keeps = [band_keep(spans, band, width, density).to(cut.device) for band in BANDS]
    longest = max(int(keep.sum(-1).max()) for keep in keeps)
    frames, pixels = (pattern(keep, tiles, longest) for keep in keeps)
    return frames, pixels


def _held(query: Tensor, key: Tensor, tiles: Tiling, band: Pattern, samples: int) -> Tensor:
    """Share of the attention of `samples` even queries that a band keeps, float32 [B, H]."""
    batch, tokens, heads, width = query.shape
    place = torch.linspace(0, tokens - 1, min(samples, tokens), dtype=torch.float64,
                           device=query.device).round().long()
    of_token = torch.searchsorted(
        tiles.offsets[1:].contiguous(), torch.arange(tokens, device=query.device), right=True)
    seen = band.keep[of_token[place]][:, of_token]
    groups = heads // key.shape[2]
    step = max(1, SCORES // max(1, batch * place.numel() * tokens * groups))
    found = []
    for begin in range(0, key.shape[2], step):
        k = key[:, :, begin : begin + step].permute(0, 2, 3, 1).float()
        part = slice(begin * groups, (begin + step) * groups)
        q = query[:, place, part].transpose(1, 2).float() * width**-0.5
        mass = (q @ k.repeat_interleave(groups, 1)).softmax(-1)
        found.append(mass.masked_fill(~seen, 0).sum((2, 3)) / place.numel())
    return torch.cat(found, 1)


def _mixed(pair: tuple[Pattern, Pattern], first: Tensor, tiles: Tiling) -> ListedMask:
    """The first pattern for heads where `first`, bool [B, H], says so; the second for others."""
    batch, heads = first.shape
    one, two = (band.expand(batch, heads, tiles) for band in pair)
    wide, flat = first[..., None, None], first[..., None]
    share = first.float().mean()
    return ListedMask(
        torch.where(wide, one.keep, two.keep), tiles.offsets, tiles.block,
        torch.where(wide, one.indices, two.indices), torch.where(flat, one.counts, two.counts),
        share * pair[0].pairs + (1 - share) * pair[1].pairs,
    )
