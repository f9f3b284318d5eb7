"""Token permutation as one gather with Triton, for tokens that are rows of numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import triton_reasons
from fastdiff.kernels.launch import launch

ROW = 1 << 16


def not_supported_reasons(x: Tensor) -> list[str]:
    reasons = triton_reasons(x.device)
    if x.ndim < 3 or not x.numel() or not x[0, :1].is_contiguous() or x[0, 0].numel() > ROW:
        reasons.append(f"a token is not one contiguous row of at most {ROW} numbers")
    return reasons


def permute(x: Tensor, order: Tensor) -> Tensor:
    from .triton_kernel import permute_tokens_fwd_kernel

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    row = x[0, 0].numel()
    # whole 16-byte pieces where the row and its start allow
    whole = all(n % 8 == 0 and n < 1 << 31 for n in (row, *x.stride()[:2]))
    width = 8 if whole else 1
    BT = 16
    launch(
        permute_tokens_fwd_kernel, (-(-x.shape[1] // BT), x.shape[0]),
        x, out, order.contiguous(), x.stride(0) // width, x.stride(1) // width, x.shape[1],
        ROW=row, BT=BT, BR=min(1 << (row - 1).bit_length(), 512), UNIT=width, num_warps=4)
    return out


def unpermute(x: Tensor, order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order.long()] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return permute(x, inverse)
