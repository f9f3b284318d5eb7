"""The order in which a GPU begins the rows of a selection: those that would end late come first."""

from functools import cache

import torch
from torch import Tensor

from fastdiff.kernels.row_order import late_first
from fastdiff.layout import Tiling, remembered


def row_order(counts: Tensor, tiles: Tiling, density: float, uneven: bool) -> Tensor | None:
    """int32 [B * H * N] for `block_sparse_attention`, or None where any order is as good.

    counts: int32 [B, H, N], key blocks that each row keeps. density: what a row keeps about.
    uneven: rows differ by more than that text rows keep everything; costs a few launches then. Text
    rows alone are known beforehand, and their order is made once.
    """
    if not counts.is_cuda:
        return None
    workers = _multiprocessors(counts.device)
    if uneven:
        return late_first(counts, workers)
    if not tiles.text_blocks:
        return None
    kept = max(1, round(density * tiles.blocks))
    return _with_text(counts.numel() // tiles.blocks, tiles.blocks, tiles.text_blocks, kept,
                      workers, counts.device)


@remembered(64)
def _with_text(
    heads: int, blocks: int, text: tuple[int, ...], kept: int, workers: int, device: torch.device
) -> Tensor:
    counts = torch.full((heads, blocks), kept)
    counts[:, list(text)] = blocks
    return late_first(counts, workers).to(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
