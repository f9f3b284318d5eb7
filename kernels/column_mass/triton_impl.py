"""Column mass as one Triton kernel: keys stay, queries stream by, nothing quadratic is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 256)

# (padded head dim, 4-byte input) -> (keys a program, queries a turn, warps, stages)
CONFIGS = {
    (64, False): (128, 64, 4, 3),
    (128, False): (128, 64, 8, 3),
    (256, False): (64, 32, 4, 2),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 32, 4, 2),
    (256, True): (64, 16, 4, 1),
}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = triton_reasons(device)
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {DTYPES}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        reasons.append(f"head_dim {head_dim} is outside {HEAD_DIMS}")
    return reasons


def run(query: Tensor, key: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
    """One program per (batch, head, tile of keys); scores and sums are float32."""
    from .triton_kernel import column_mass_fwd_kernel

    B, Sq, Hq, D = query.shape
    Sk, Hk = key.shape[1:3]
    H = max(Hq, Hk)
    out = torch.empty(B, H, Sk, dtype=torch.float32, device=query.device)
    BD = max(16, 1 << (D - 1).bit_length())
    BN, BM, warps, stages = CONFIGS[max(64, BD), query.dtype.itemsize == 4]
    strides = [*query.stride()[:3], *key.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    column_mass_fwd_kernel[(-(-Sk // BN), B * H)](
        query,
        key,
        out if bias is None else bias.contiguous(),
        out,
        *(stride // unit for stride in strides),
        Sq,
        Sk,
        H,
        H // Hq,
        H // Hk,
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
        D=D,
        BM=BM,
        BN=BN,
        BD=BD,
        USE_BIAS=bias is not None,
        UPCAST=interpreting(),
        UNIT=unit,
        num_warps=warps,
        num_stages=stages,
    )
    return out
