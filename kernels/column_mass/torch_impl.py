"""Column mass in torch operations: a few rows of scores at a time, folded by logaddexp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# scores held at a time, in all heads: 8 MiB of float32
SCORES = 1 << 21


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is not one of {DTYPES}"]


def row_lse(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """One product per chunk of keys; memory beyond the result is max(SCORES, one row)."""
    return _folded(query, key, None, scale)


def column_mass(
    query: Tensor, key: Tensor, lse: Tensor, log_weight: Tensor | None, *, scale: float
) -> Tensor:
    """One product per chunk of queries."""
    weight = -math.log(query.shape[1]) if log_weight is None else log_weight
    return _folded(key, query, weight - lse, scale)


def _folded(stay: Tensor, stream: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """log sum_i exp(scale * stream_i . stay_j + bias_i), [B, H, S]; `stay` has S rows.

    The two sides may have fewer heads than each other: the smaller count divides the larger, H.
    """
    B, S, _, D = stay.shape
    H, count = max(stay.shape[2], stream.shape[2]), stream.shape[1]
    precision = torch.promote_types(stay.dtype, torch.float32)
    k = expanded(stay, H).to(precision).reshape(B * H, S, D)
    q = expanded(stream, H).to(precision).reshape(B * H, count, D)
    if bias is not None:
        bias = bias.reshape(B * H, 1, count)
    step = max(1, SCORES // max(1, B * H * S))
    total = None
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        # what stays in rows: sums along the last dimension are the fast ones
        scores = torch.bmm(k, q[:, part].mT * scale)
        if bias is not None:
            scores += bias[:, :, part]
        found = scores.logsumexp(-1)
        total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total.view(B, H, S)


def expanded(x: Tensor, heads: int) -> Tensor:
    """[B, S, h, D] -> [B, heads, S, D], each head repeated for its group."""
    x = x.transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
