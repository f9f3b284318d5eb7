"""Tile selection in two launches: scores with their histogram, then cut and lists."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import large, launch

HEAD_DIM = 256
TILES = 16384
# tiles of a row that a program holds at a time
ROW = 2048
BINS, REACH = 1024, 8.0


def not_supported_reasons(query: Tensor, key_mean: Tensor, probes: int) -> list[str]:
    reasons = triton_reasons(query.device, query.dtype)
    if query.shape[-1] > HEAD_DIM:
        reasons.append(f"head_dim {query.shape[-1]} is above {HEAD_DIM}")
    if query.shape[-1] > 128 and query.dtype.itemsize == 4 and not large(query.device):
        reasons.append(f"head_dim {query.shape[-1]} of {query.dtype} needs more shared memory")
    if query.stride(-1) != 1:
        reasons.append(f"the query's last dimension is not contiguous, strides {query.stride()}")
    if key_mean.shape[2] > TILES:
        reasons.append(f"{key_mean.shape[2]} tiles are more than {TILES}")
    if probes not in (1, 2, 4, 8, 16):
        reasons.append(f"probes={probes} is not a power of two up to 16")
    return reasons


def run(
    query: Tensor, key_mean: Tensor, offsets: Tensor, always: Tensor, dense_rows: Tensor, *,
    density: float, probes: int, each_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_kernel import tile_list_kernel, tile_score_kernel

    B, S, H, D = query.shape
    HK, N = key_mean.shape[1:3]
    device = query.device
    x = torch.empty(B, H, N, N, dtype=torch.float32, device=device)
    if each_row:
        pairs = torch.empty((), dtype=torch.int64, device=device)
        # not read
        stats = histogram = pairs
    else:
        stats = torch.empty(B, H, N, 2, dtype=torch.float32, device=device)
        # the histograms, and after them the kept pairs: one memory to set to zero
        zeros = torch.zeros(B * BINS // 2 + 1, dtype=torch.int64, device=device)
        histogram, pairs = zeros[:-1].view(torch.int32), zeros[-1]
    keep = torch.empty(B, H, N, N, dtype=torch.bool, device=device)
    indices = torch.empty(B, H, N, N, dtype=torch.int32, device=device)
    counts = torch.empty(B, H, N, dtype=torch.int32, device=device)
    if x.numel() == 0:
        return keep, indices, counts, pairs.zero_()
    key_mean = key_mean if key_mean.stride(-1) == 1 else key_mean.contiguous()
    always, dense_rows = (x.contiguous().view(torch.uint8) for x in (always, dense_rows))
    offsets = offsets.contiguous()
    if each_row:
        # whole tiles, counted in the precision of the host
        density = int(density * N + 0.5) / N
    # the interpreter, and other makers' GPUs, have no such log
    fast = query.is_cuda and torch.version.hip is None and not interpreting()
    ROWS = max(1, 64 // probes)
    # wider takes so much shared memory that a multiprocessor holds one program
    BN, stages = min(64, max(16, 1 << (N - 1).bit_length())), 3
    BD = max(16, 1 << (D - 1).bit_length())
    if BD * query.dtype.itemsize > 256 and not large(query.device):
        # fits the 99 KiB of the smallest cards
        BN, stages = 16, 1
    # the histogram starts anew at every step, so its steps are long
    BC = min(2048 // ROWS, max(16, 1 << (N - 1).bit_length()))
    launch(
        tile_score_kernel, (-(-N // ROWS), B * H),
        query, key_mean, offsets, always, dense_rows, x, stats, histogram, pairs,
        *query.stride()[:3], *key_mean.stride()[:3], S, H, H // HK, N,
        D**-0.5 * 1.4426950408889634, D=D, BD=BD, PROBES=probes,
        ROWS=ROWS, BN=BN, BC=BC, BINS=BINS, REACH=REACH, EACH_ROW=each_row, UPCAST=interpreting(),
        FAST=fast, num_warps=4, num_stages=stages,
    )
    BN = min(ROW, max(16, 1 << (N - 1).bit_length()))
    launch(
        tile_list_kernel, (N, B * H),
        x, stats, histogram, offsets, always, dense_rows, keep.view(torch.uint8), indices, counts,
        pairs, S, H, N, float(density), BN=BN, BINS=BINS, REACH=REACH, EACH_ROW=each_row,
        # bits of a step's number, and one for the end
        SINGLE=BN >= N, TURNS=BINS.bit_length(), FAST=fast, num_warps=4 if BN > 512 else 1,
    )
    return keep, indices, counts, pairs
