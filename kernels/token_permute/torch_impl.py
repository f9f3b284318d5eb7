"""Token permutation as one gather; the inverse gathers by the inverse order."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x: Tensor, order: Tensor) -> Tensor:
    return x.index_select(1, order)


def unpermute(x: Tensor, order: Tensor) -> Tensor:
    tokens = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    inverse = torch.empty_like(order).index_copy_(0, order.long(), tokens)
    return x.index_select(1, inverse)
