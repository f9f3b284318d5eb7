"""Column mass as two Triton kernels: one side stays, the other streams by, nothing quadratic."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import large, launch, strides_in_units

LOG2E = 1.4426950408889634

# added to the exponent of every term, a probability times a weight of at most 1: sums of 2**30
# queries stay finite, and terms down to 2**-190 count
SHIFT = 64.0

# (padded head dim, 4-byte input) -> (queries a tile, keys a tile, warps, stages)
LSE = {
    (64, False): (64, 128, 4, 3),
    (128, False): (128, 64, 8, 3),
    (256, False): (64, 32, 4, 2),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 16, 4, 2),
    (256, True): (64, 16, 4, 1),
}
# for cards with less shared memory than Hopper's, down to the 99 KiB of the smallest
SMALL_LSE = {**LSE, (256, True): (32, 16, 4, 1)}
MASS = {
    (64, False): (64, 128, 4, 3),
    (128, False): (64, 128, 8, 3),
    (256, False): (64, 32, 4, 2),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 16, 4, 2),
    (256, True): (64, 16, 4, 1),
}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return triton_reasons(device, dtype, head_dim)


def row_lse(query: Tensor, key: Tensor, *, scale: float) -> Tensor:
    """One program per (batch, head, tile of queries); scores and sums are float32."""
    from .triton_kernel import row_lse_kernel

    B, Sq, H, D = query.shape
    Sk, Hk = key.shape[1:3]
    out = torch.empty(B, H, Sq, dtype=torch.float32, device=query.device)
    BM, BN, warps, stages = (LSE if large(query.device) else SMALL_LSE)[_kind(query)]
    strides, unit = strides_in_units(query, key)
    launch(
        row_lse_kernel, (-(-Sq // BM), B * H),
        query, key, out, *strides, Sq, Sk, H, H // Hk,
        # the kernels' exponentials are powers of two
        scale * LOG2E,
        D=D, BM=BM, BN=BN, BD=_padded(D), UPCAST=interpreting(), UNIT=unit,
        num_warps=warps, num_stages=stages,
    )
    return out


def column_mass(
    query: Tensor, key: Tensor, lse: Tensor, log_weight: Tensor | None, *, scale: float
) -> Tensor:
    """One program per (batch, head, tile of keys). No running maximum: see SHIFT."""
    from .triton_kernel import column_mass_kernel

    B, Sq, H, D = query.shape
    Sk, Hk = key.shape[1:3]
    out = torch.empty(B, H, Sk, dtype=torch.float32, device=query.device)
    BM, BN, warps, stages = MASS[_kind(query)]
    strides, unit = strides_in_units(query, key)
    lse = lse.contiguous()
    weight = lse if log_weight is None else log_weight.contiguous()
    launch(
        column_mass_kernel, (-(-Sk // BN), B * H),
        query, key, lse, weight, lse if log_weight is None else weight.amax(-1), out,
        *strides, Sq, Sk, H, H // Hk, scale * LOG2E, -math.log(Sq),
        D=D, BM=BM, BN=BN, BD=_padded(D), WEIGHTED=log_weight is not None, SHIFT=SHIFT,
        UPCAST=interpreting(), UNIT=unit, num_warps=warps, num_stages=stages,
    )
    return out


def _kind(query: Tensor) -> tuple[int, bool]:
    return max(64, _padded(query.shape[-1])), query.dtype.itemsize == 4


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())
