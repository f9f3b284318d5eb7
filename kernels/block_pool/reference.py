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
    B, _, H, D = x.shape
    blocks = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    mean = x_valid.new_zeros(B, H, len(blocks), D)
    weight = torch.zeros(B, len(blocks), dtype=torch.float32, device=x.device)
    for i, (start, end) in enumerate(blocks):
        weight[:, i] = mask[:, start:end].sum(1)
        total = x_valid[:, start:end].sum(1)
        mean[:, :, i] = total / mask[:, start:end].sum(1).clamp(min=1)[:, None, None]
    return mean.to(x.dtype), weight
