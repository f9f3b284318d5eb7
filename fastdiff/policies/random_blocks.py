"""RandomBlocks: the control; any method worth its time must beat it at the same density."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.layout import Tiling
from fastdiff.policies.base import Context, Policy
from fastdiff.policies.tile_sparse import keep_tiles


@dataclass(frozen=True, kw_only=True)
class RandomBlocks(Policy):
    """Keeps tiles at random, and always: the own tile, text, the first `sink` frames.

    The draw depends on `seed`, the layer and the step only, so a run can be repeated. It is the
    same for every sample of a batch. The tail is off unless asked for.
    """

    name: ClassVar[str] = "random-blocks"
    summary: ClassVar[str] = "random tiles: the control for measurements, not for use"

    tail: bool = False

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        generator = torch.Generator("cpu").manual_seed(context.seed)
        heads = query.shape[2]
        scores = torch.rand(1, heads, tiles.blocks, tiles.blocks, generator=generator,
                            dtype=torch.float32, device="cpu")
        scores = scores.to(query.device)
        keep = keep_tiles(scores, tiles, "threshold", self.density, None, None)
        keep = keep.expand(query.shape[0], -1, -1, -1)
        return BlockMask(keep, tiles.offsets, tiles.block)
