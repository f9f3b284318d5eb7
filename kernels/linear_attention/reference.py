"""The meaning of linear attention, written as attention with a map of products of features."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """It runs everywhere; it is slow and needs the whole map."""
    return []


def run(query: Tensor, key: Tensor, value: Tensor, *, eps: float) -> Tensor:
    precision = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(precision).transpose(1, 2) for x in (query, key, value))
    weights = feature(q) @ feature(k).mT / k.shape[2]
    output = (weights @ v) / (weights.sum(-1, keepdim=True) + eps)
    return output.transpose(1, 2).to(query.dtype).contiguous()


def feature(u: Tensor) -> Tensor:
    """elu(u) + 1: exp(u) below zero, u + 1 above."""
    return torch.where(u > 0, u + 1, u.clamp(max=0).exp())
