"""The meaning of block pooling, one block at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(x: Tensor) -> list[str]:
    return []


def run(x: Tensor, offsets: Tensor, *, block: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    precision = torch.promote_types(x.dtype, torch.float32)
    if mask is None:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    x_valid = x.to(precision).masked_fill(~mask[:, :, None, None], 0)
    means, weights = [], []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        weight = mask[:, start:end].sum(1)
        total = x_valid[:, start:end].sum(1)
        means.append(total / weight.clamp(min=1)[:, None, None])
        weights.append(weight)
    return torch.stack(means, 2).to(x.dtype), torch.stack(weights, 1).float()
