"""Token selection as two Triton kernels: a launch for the order, a launch for the stand-ins."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import launch, shared_memory, strides_in_units

# scores that one program holds
TOKENS = 32768
# bytes of shared memory of a block that so many may take, and how many a card with less gets
SHARED, SMALL_TOKENS = 128 << 10, 8192

# 4-byte input -> (dropped tokens a program, kept tokens a turn, channels a product, warps, stages)
CONFIGS = {False: (64, 128, 64, 4, 4), True: (64, 64, 32, 4, 2)}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, tokens: int) -> list[str]:
    reasons = triton_reasons(device, dtype)
    most = TOKENS
    if not reasons and shared_memory(device) < SHARED:
        most = SMALL_TOKENS
    if tokens > most:
        reasons.append(f"{tokens} tokens are more than {most}")
    return reasons


def top_tokens(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """One program per sample: the cut by bisection of the bits, then places by counting."""
    from .triton_kernel import top_tokens_kernel

    batch, tokens = score.shape
    kept = torch.empty(batch, count, dtype=torch.int64, device=score.device)
    dropped = torch.empty(batch, tokens - count, dtype=torch.int64, device=score.device)
    if batch and tokens:
        block = max(16, 1 << (tokens - 1).bit_length())
        launch(
            top_tokens_kernel, (batch,),
            score, kept, dropped, score.stride(0), score.stride(1), tokens, count,
            BLOCK=block, num_warps=min(32, max(1, block // 256)),
        )
    return kept, dropped


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, scale: float
) -> Tensor:
    """One program per tile of dropped tokens; products are float32, so nothing needs `scale`."""
    from .triton_kernel import stand_ins_kernel

    batch, tokens, width = query.shape
    place = torch.empty(batch, tokens, dtype=torch.int64, device=query.device)
    BM, BN, BD, warps, stages = CONFIGS[query.dtype.itemsize == 4]
    strides, unit = strides_in_units(query, key)
    tiles = -(-max(kept.shape[1], dropped.shape[1]) // BM)
    launch(
        stand_ins_kernel, (tiles, batch),
        query, key, kept.contiguous(), dropped.contiguous(), place,
        *strides, tokens, kept.shape[1],
        C=width, BM=BM, BN=BN, BD=BD, UPCAST=interpreting(), UNIT=unit,
        num_warps=warps, num_stages=stages,
    )
    return place
