"""Linear attention as two Triton kernels: states of stretches of keys, then the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import large, launch, strides_in_units

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
    BV, BT, stages = min(64, BD), 64 if BD <= 128 else 32, 3
    if BD >= 128 and query.dtype.itemsize == 4 and not large(query.device):
        # fits the 99 KiB of the smallest cards
        BT, stages = 16, 1
    tiles = -(-S // BT)
    values = -(-D // BV)
    stretches = max(1, min(tiles, PROGRAMS // max(1, B * H * values)))
    turns = -(-tiles // stretches)
    stretches = -(-tiles // turns)
    new = {"dtype": torch.float32, "device": query.device}
    state = torch.empty(stretches, B * H, D, D, **new)
    total = torch.empty(stretches, B * H, D, **new)
    strides, unit = strides_in_units(key, value)
    upcast = interpreting()
    warps = 8 if BD > 128 else 4
    launch(
        linear_state_kernel, (stretches, values, B * H),
        key, value, state, total, *strides, S, H, turns * BT,
        D=D, BT=BT, BD=BD, BV=BV, UPCAST=upcast, UNIT=unit, num_warps=warps,
        num_stages=stages,
    )
    state = state.sum(0).div_(S).to(query.dtype)
    total = total.sum(0).div_(S)
    output = torch.empty(B, Sq, H, D, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    strides, unit = strides_in_units(query, output)
    launch(
        linear_output_kernel, (-(-Sq // BT), B * H),
        query, state, total, output, *strides, Sq, H, eps,
        D=D, BT=BT, BD=BD, BV=BV, UPCAST=upcast, UNIT=unit, num_warps=warps,
        num_stages=stages,
    )
    return output
