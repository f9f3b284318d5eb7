"""The order of rows as one launch of one program."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import triton_reasons
from fastdiff.kernels.launch import launch

# rows that the program looks at together
ROWS = 4096


def not_supported_reasons(counts: Tensor) -> list[str]:
    return triton_reasons(counts.device)


def late_first(counts: Tensor, workers: int) -> Tensor:
    from .triton_kernel import late_first_kernel

    rows = counts.numel()
    order = torch.empty(rows, dtype=torch.int32, device=counts.device)
    if rows:
        block = min(ROWS, max(128, 1 << (rows - 1).bit_length()))
        launch(
            late_first_kernel, (1,),
            counts.contiguous(), order, rows, workers, BLOCK=block, num_warps=max(1, block // 512))
    return order
