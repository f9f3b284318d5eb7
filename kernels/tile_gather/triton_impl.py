"""Gathering into tiles as one launch: each row is read once and written once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import triton_reasons
from fastdiff.kernels.launch import launch

HEAD_DIM = 256


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = triton_reasons(query.device, query.dtype)
    if query.shape[-1] > HEAD_DIM:
        reasons.append(f"head_dim {query.shape[-1]} is above {HEAD_DIM}")
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        reasons.append("the last dimension is not contiguous")
    return reasons


def run(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, offsets: Tensor, *, block: int,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    from .triton_kernel import tile_gather_fwd_kernel

    B, S, H, D = query.shape
    HK = key.shape[2]
    N = offsets.numel() - 1
    order, offsets = order.contiguous(), offsets.contiguous()
    q, k, v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    key_mean, value_mean = (
        torch.empty(B, HK, N, D, dtype=key.dtype, device=key.device) for _ in range(2))
    weight = torch.empty(B, N, dtype=torch.float32, device=query.device)
    if N == 0 or q.numel() == 0:
        return q, k, v, key_mean.zero_(), value_mean.zero_(), weight.zero_()
    BD = 1 << (D - 1).bit_length()
    launch(
        tile_gather_fwd_kernel, (N, B * H + 2 * B * HK),
        query, key, value, q, k, v, key_mean, value_mean, weight, order, offsets,
        offsets if mask is None else mask.contiguous().view(torch.uint8),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        B, S, H, HK, N, D=D, BD=BD, BT=max(16, 4096 // BD), USE_MASK=mask is not None, num_warps=4,
    )
    return q, k, v, key_mean, value_mean, weight
