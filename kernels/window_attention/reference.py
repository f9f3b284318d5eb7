"""The meaning of window attention, written as dense attention under a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .geometry import Window, bounds


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """It runs everywhere; it is slow and needs the whole score matrix."""
    return []


def run(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, before: int,
    key_mask: Tensor | None, scale: float,
) -> Tensor:
    """In float32 (float64 stays)."""
    precision = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[2] // key.shape[2]
    q = query.to(precision).transpose(1, 2)
    k, v = (x.to(precision).transpose(1, 2).repeat_interleave(groups, 1) for x in (key, value))
    visible = sees(window, before, q.shape[2], query.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    scores = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    # a query that sees nothing has scores of -inf alone, whose softmax is NaN
    probabilities = scores.softmax(-1).masked_fill(~visible.any(-1, keepdim=True), 0)
    return (probabilities @ v).transpose(1, 2).to(query.dtype).contiguous()


def sees(window: Window, before: int, tokens: int, device: torch.device) -> Tensor:
    """Which token sees which, bool [tokens, tokens]."""
    t, h, w = (
        torch.stack([(torch.arange(n) >= low) & (torch.arange(n) < high)
                     for low, high in zip(*axis, strict=True)])
        for n, axis in zip(window.grid, bounds(window), strict=True))
    inside = (t[:, None, None, :, None, None] & h[:, None, None, :, None]
              & w[:, None, None, :]).reshape(window.tokens, window.tokens)
    found = torch.ones(tokens, tokens, dtype=torch.bool)
    place = slice(before, before + window.tokens)
    found[place, place] = inside
    return found.to(device)
