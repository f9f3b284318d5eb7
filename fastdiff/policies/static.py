"""StaticMask: a block mask that is the same at every call, with its lists made once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.layout import Tiling


@dataclass(frozen=True)
class StaticMask(BlockMask):
    """A BlockMask [B, H, NQ, NK] whose lists and density are known.

    listed: int32 [B, H, NQ, M], kept blocks first; listed_counts: int32 [B, H, NQ]; pairs: 0-dim.
    """

    listed: Tensor
    listed_counts: Tensor
    pairs: Tensor

    def lists(self) -> tuple[Tensor, Tensor]:
        return self.listed, self.listed_counts

    def density(self) -> Tensor:
        return self.pairs


@dataclass(frozen=True)
class Pattern:
    """One keep map for all heads and samples. keep: bool [N, N]; listed: [N, M]; counts: [N]."""

    keep: Tensor
    listed: Tensor
    counts: Tensor
    pairs: Tensor

    def expand(self, batch: int, heads: int, tiles: Tiling) -> StaticMask:
        keep, listed, counts = (
            x.expand(batch, heads, *x.shape) for x in (self.keep, self.listed, self.counts)
        )
        return StaticMask(keep, tiles.offsets, tiles.block, listed, counts, self.pairs)


def pattern(keep: Tensor, tiles: Tiling, width: int | None = None) -> Pattern:
    """Lists of a keep map, bool [N, N]; once for a layout, as it reads the map on the host.

    width: entries of a list, when two patterns must fit together; None takes the fewest.
    """
    counts = keep.sum(-1, dtype=torch.int32)
    listed = torch.argsort(~keep, dim=-1, stable=True).to(torch.int32)
    width = width or int(counts.max())
    share = tiles.lengths / tiles.lengths.sum()
    pairs = (keep.float() @ share) @ share
    return Pattern(keep, listed[:, :width].contiguous(), counts, pairs)
