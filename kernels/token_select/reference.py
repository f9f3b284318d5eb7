"""The meaning of token selection: every token against every other, and all products."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """It runs everywhere; it is slow and needs all products."""
    return []


def top_tokens(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    nan = score.isnan()
    # [B, i, j]: whether j is above i; NaN is above every number
    above = (score[:, None] > score[:, :, None]) | (nan[:, None] & ~nan[:, :, None])
    tokens = torch.arange(score.shape[1], device=score.device)
    before = tokens[None] < tokens[:, None]
    better = above | (~above & ~above.mT & before)
    kept = better.sum(-1) < count
    parts = (kept, count), (~kept, len(tokens) - count)
    first, other = (mask.nonzero()[:, 1].view(len(score), size) for mask, size in parts)
    return first, other


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    precision = torch.promote_types(query.dtype, torch.float32)
    products = query.to(precision) @ key.to(precision).mT * scale
    products = products.gather(2, kept[:, None].expand(-1, products.shape[1], -1))
    place = products.argmax(-1)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return place.scatter(1, kept, own)
