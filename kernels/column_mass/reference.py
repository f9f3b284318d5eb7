"""The meaning of column mass: a logsumexp down the columns of the score matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """It runs everywhere; it is slow and needs the whole score matrix."""
    return []


def run(query: Tensor, key: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """log sum_i exp(scale * query_i . key_j + bias_i), [B, H, Sk].

    The two sides may have fewer heads than each other: the smaller count divides the larger, H.
    """
    precision = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(precision).transpose(1, 2), key.to(precision).transpose(1, 2)
    heads = max(q.shape[1], k.shape[1])
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    scores = q @ k.mT * scale
    if bias is not None:
        scores = scores + bias[..., None]
    return scores.logsumexp(2)
