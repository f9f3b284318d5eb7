"""Token selection in torch operations: sorts, and products of some dropped tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

# most products in memory at a time
PAIRS = 1 << 24


def not_supported_reasons(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    return []


def top_tokens(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Three sorts: by score, then the positions of either part."""
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    """Products in the dtype of query, PAIRS of them at most or one row."""
    batch, tokens = query.shape[:2]
    place = torch.empty(batch, tokens, dtype=torch.int64, device=kept.device)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    place.scatter_(1, kept, own)
    q, k = _rows(query, dropped).mul_(scale), _rows(key, kept)
    step = max(1, PAIRS // max(1, batch * kept.shape[1]))
    for some, part in zip(dropped.split(step, dim=1), q.split(step, dim=1), strict=True):
        place.scatter_(1, some, torch.bmm(part, k.mT).argmax(-1))
    return place


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
