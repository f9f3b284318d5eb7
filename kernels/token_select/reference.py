"""The meaning of token selection: a stable sort, and the whole matrix of products."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    """It runs everywhere; it is slow and needs all products."""
    return []


def top_tokens(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    order = score.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    precision = torch.promote_types(query.dtype, torch.float32)
    products = query.to(precision) @ key.to(precision).mT * scale
    products = products.gather(2, kept[:, None].expand(-1, products.shape[1], -1))
    place = products.argmax(-1)
    own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return place.scatter(1, kept, own)
