"""Block means in one pass over memory with Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import triton_reasons
from fastdiff.kernels.launch import launch

HEAD_DIM = 1024


def not_supported_reasons(x: Tensor) -> list[str]:
    reasons = triton_reasons(x.device, x.dtype)
    if x.shape[-1] > HEAD_DIM:
        reasons.append(f"head_dim {x.shape[-1]} is above {HEAD_DIM}")
    if x.stride(-1) != 1:
        reasons.append(f"the last dimension is not contiguous, strides {x.stride()}")
    return reasons


def run(x: Tensor, offsets: Tensor, *, block: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from .triton_kernel import block_pool_fwd_kernel

    B, S, H, D = x.shape
    N = offsets.numel() - 1
    mean = torch.empty(B, H, N, D, dtype=x.dtype, device=x.device)
    weight = torch.empty(B, N, dtype=torch.float32, device=x.device)
    if mean.numel() == 0:
        return mean, weight.zero_()
    BD = 1 << (D - 1).bit_length()
    launch(
        block_pool_fwd_kernel, (N, B * H),
        x,
        offsets.contiguous(),
        offsets if mask is None else mask.contiguous().view(torch.uint8),
        mean,
        weight,
        *x.stride()[:3],
        S,
        H,
        N,
        D=D,
        BD=BD,
        BT=max(16, 4096 // BD),
        USE_MASK=mask is not None,
        num_warps=4,
    )
    return mean, weight
