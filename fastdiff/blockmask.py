"""BlockMask: per (batch, head, query block) the key blocks that attention keeps."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Which key blocks each query block attends to.

    keep: bool [B, H, NQ, NK].
    offsets: int32 [N + 1], token ranges of the blocks (queries and keys share them).
    block: the longest block, in tokens.
    """

    keep: Tensor
    offsets: Tensor
    block: int

    def lists(self) -> tuple[Tensor, Tensor]:
        """Kept blocks first: indices int32 [B, H, NQ, NK] and counts int32 [B, H, NQ]."""
        counts = self.keep.sum(-1, dtype=torch.int32)
        indices = torch.argsort(~self.keep, dim=-1, stable=True).to(torch.int32)
        return indices, counts

    def density(self) -> Tensor:
        """Kept fraction of query-key pairs, float32 scalar on the mask's device (no sync)."""
        lengths = self.offsets.diff().float()
        share = lengths / lengths.sum()
        return ((self.keep.float() @ share) @ share).mean()

    def to_dense(self) -> Tensor:
        """bool [B, H, S, S] in tile order. For tests and pictures: quadratic memory."""
        lengths = self.offsets.diff().long()
        rows = self.keep.repeat_interleave(lengths, dim=-2)
        return rows.repeat_interleave(lengths, dim=-1)


@dataclass(frozen=True)
class ListedMask(BlockMask):
    """A BlockMask whose lists and density were made with it: nothing is sorted at a call."""

    indices: Tensor
    counts: Tensor
    kept: Tensor

    def lists(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.counts

    def density(self) -> Tensor:
        return self.kept
