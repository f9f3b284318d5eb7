"""The meaning of column mass: logsumexp of the score matrix along its rows, or down its columns."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """It runs everywhere; it is slow and needs the whole score matrix."""
    return []


def row_lse(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """log sum_j exp(scale * query_i . key_j), [B, H, Sq]."""
    return _scores(query, key, scale).logsumexp(3)


def column_mass(
    query: Tensor, key: Tensor, lse: Tensor, log_weight: Tensor | None, *, scale: float
) -> Tensor:
    """log sum_i exp(scale * query_i . key_j - lse_i + log_weight_i), [B, H, Sk]."""
    weight = -math.log(query.shape[1]) if log_weight is None else log_weight[..., None]
    return (_scores(query, key, scale) - lse[..., None] + weight).logsumexp(2)


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    precision = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(precision).transpose(1, 2), key.to(precision).transpose(1, 2)
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
