"""Linear attention as two Triton kernels: states of stretches of keys, then the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons

# programs that are enough to fill a GPU; more only add partial states
PROGRAMS = 512


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return triton_reasons(device, dtype, head_dim)


def run(query: Tensor, key: Tensor, value: Tensor, *, eps: float) -> Tensor:
    """Features and sums are float32; the two products take the input's dtype.

    Every stretch of keys has its own partial state, summed in a fixed order, so that a run can be
    repeated to the bit.
    """
    from .triton_kernel import linear_output_kernel, linear_state_kernel

    B, Sq, H, D = query.shape
    S = key.shape[1]
    BD = max(16, 1 << (D - 1).bit_length())
    BV, BT = min(64, BD), 64 if BD <= 128 else 32
    tiles = -(-S // BT)
    values = -(-D // BV)
    stretches = max(1, min(tiles, PROGRAMS // max(1, B * H * values)))
    turns = -(-tiles // stretches)
    stretches = -(-tiles // turns)
    new = {"dtype": torch.float32, "device": query.device}
    state = torch.empty(stretches, B * H, D, D, **new)
    total = torch.empty(stretches, B * H, D, **new)
    strides = [*key.stride()[:3], *value.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    upcast = interpreting()
    warps = 8 if BD > 128 else 4
    linear_state_kernel[(stretches, values, B * H)](
        key, value, state, total, *(stride // unit for stride in strides), S, H, turns * BT,
        D=D, BT=BT, BD=BD, BV=BV, UPCAST=upcast, UNIT=unit, num_warps=warps,
    )
    state = state.sum(0).div_(S).to(query.dtype)
    total = total.sum(0).div_(S)
    output = torch.empty(B, Sq, H, D, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    strides = [*query.stride()[:3], *output.stride()[:3]]
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    linear_output_kernel[(-(-Sq // BT), B * H)](
        query, state, total, output, *(stride // unit for stride in strides), Sq, H, eps,
        D=D, BT=BT, BD=BD, BV=BV, UPCAST=upcast, UNIT=unit, num_warps=warps,
    )
    return output
