"""The meaning of token permutation, by indexing."""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x: Tensor, order: Tensor) -> Tensor:
    return x[:, order.long()]


def unpermute(x: Tensor, order: Tensor) -> Tensor:
    restored = torch.empty_like(x)
    restored[:, order.long()] = x
    return restored
