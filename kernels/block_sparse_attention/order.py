"""The order in which rows of uneven lists are worked on."""

from __future__ import annotations

import torch
from torch import Tensor


def longest_first(counts: Tensor) -> Tensor:
    """Row numbers, int32 [B * H * NQ]: pairs of heads stay together, longest lists of a pair first.

    counts: int32 [B, H, NQ]. A long row that is begun last keeps a whole GPU waiting; pairs keep
    their keys in the cache.
    """
    B, H, NQ = counts.shape
    parts = counts.reshape(B * H // 2 if H % 2 == 0 else B * H, NQ * (2 - H % 2))
    rows = parts.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(parts), device=counts.device)[:, None] * parts.shape[1]
    return (rows + first).flatten().to(torch.int32)
