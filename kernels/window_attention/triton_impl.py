"""Window attention as one plain Triton kernel, in raster order, with pointer loads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import large, launch, strides_in_units

from .geometry import Window, boxes, table
from .text import fill_text

# (padded head dim, 4-byte input) -> BM, BN, warps, stages
CONFIGS = {
    (64, False): (64, 64, 4, 3),
    (128, False): (64, 64, 4, 3),
    (256, False): (128, 32, 8, 2),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 16, 4, 2),
    (256, True): (64, 16, 4, 1),
}
# for cards with less shared memory than Hopper's, down to the 99 KiB of the smallest
SMALL_CONFIGS = {
    **CONFIGS,
    (128, False): (64, 64, 4, 2),
    (256, False): (64, 16, 4, 2),
    (256, True): (32, 16, 4, 1),
}


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return triton_reasons(query.device, query.dtype, query.shape[-1])


def run(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, before: int,
    key_mask: Tensor | None, scale: float,
) -> Tensor:
    """One program per (batch, head, box of queries), heads outermost so that K, V stay in L2."""
    from .triton_kernel import window_attention_fwd_kernel

    B, S, H, D = query.shape
    output = torch.empty(B, S, H, D, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    fill_text(output, query, key, value, before=before, grid_tokens=window.tokens,
              key_mask=key_mask, scale=scale)
    args, settings, programs = arguments(query, key, value, output, window, before=before,
                                         key_mask=key_mask, scale=scale)
    launch(window_attention_fwd_kernel, programs, *args, **settings)
    return output


def arguments(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, window: Window, *, before: int,
    key_mask: Tensor | None, scale: float,
) -> tuple[tuple, dict, tuple[int, int]]:
    """(arguments, compile-time settings, programs) of one launch."""
    B, S, H, D = query.shape
    BD = max(16, 1 << (D - 1).bit_length())
    configs = CONFIGS if large(query.device) else SMALL_CONFIGS
    BM, BN, warps, stages = configs[max(64, BD), query.dtype.itemsize == 4]
    found = boxes(window, BM, BN)
    strides, unit = strides_in_units(query, key, value, output)
    low, high = table(window, query.device)
    args = (
        query, key, value, output, low, high,
        low if key_mask is None else key_mask.contiguous().view(torch.uint8),
        *strides, *window.grid, *found.tiles[1:], before, S, H,
        H // key.shape[2],
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
    )
    settings = dict(
        zip(("QT", "QH", "QW", "KT", "KH", "KW"), found.query + found.key, strict=True),
        D=D, BM=BM, BN=BN, BD=BD, USE_MASK=key_mask is not None, UPCAST=interpreting(), UNIT=unit,
        num_warps=warps, num_stages=stages)
    tiles = found.tiles
    return args, settings, (tiles[0] * tiles[1] * tiles[2], B * H)
