"""Pattern: a block mask that is the same at every call, with its lists made once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.layout import Tiling
from fastdiff.policies.modes import ListedMask


@dataclass(frozen=True)
class Pattern:
    """One keep map for all heads and samples. keep: bool [N, N]; listed: [N, M]; counts: [N]."""

    keep: Tensor
    listed: Tensor
    counts: Tensor
    pairs: Tensor

    def expand(self, batch: int, heads: int, tiles: Tiling) -> ListedMask:
        keep, listed, counts = (
            x.expand(batch, heads, *x.shape) for x in (self.keep, self.listed, self.counts)
        )
        return ListedMask(keep, tiles.offsets, tiles.block, listed, counts, self.pairs)


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
