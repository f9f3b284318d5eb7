"""Column mass in torch operations: a few rows of scores at a time, folded by logaddexp."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# scores held at a time, in all heads: 8 MiB of float32
SCORES = 1 << 21


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is not one of {DTYPES}"]


def run(query: Tensor, key: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """One product per chunk of queries; memory beyond the result is max(SCORES, one row)."""
    B, Sq, Hq, D = query.shape
    Sk, Hk = key.shape[1:3]
    H = max(Hq, Hk)
    precision = torch.promote_types(query.dtype, torch.float32)
    k = expanded(key, H).to(precision).reshape(B * H, Sk, D)
    q = expanded(query, H).to(precision).reshape(B * H, Sq, D)
    if bias is not None:
        bias = bias.reshape(B * H, 1, Sq)
    step = max(1, SCORES // max(1, B * H * Sk))
    total = None
    for begin in range(0, Sq, step):
        part = slice(begin, begin + step)
        # keys in rows: sums along the last dimension are the fast ones
        scores = torch.bmm(k, q[:, part].mT * scale)
        if bias is not None:
            scores += bias[:, :, part]
        found = scores.logsumexp(-1)
        total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total.view(B, H, Sk)


def expanded(x: Tensor, heads: int) -> Tensor:
    """[B, S, h, D] -> [B, heads, S, D], each head repeated for its group."""
    x = x.transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
