"""Mean of the tokens of every block."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

from .backward import block_unpool, differentiable

__all__ = ["block_pool", "block_unpool"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}
AUTO = ("triton", "torch")


def block_pool(
    x: Tensor, offsets: Tensor, *, block: int, mask: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Mean of each block's valid tokens, and how many there are.

    x: [B, S, H, D], any strides, D contiguous. offsets: int32 [N + 1], from 0 to S, not falling.
    block: upper bound of the block lengths. mask: bool [B, S]; a False token is left out.
    returns: mean [B, H, N, D] in x's dtype, summed in float32; weight float32 [B, N]. A block
        without a valid token has mean 0 and weight 0. The mean is differentiable in x.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, S, H, D], got {tuple(x.shape)}")
    if offsets.ndim != 1 or offsets.dtype != torch.int32 or offsets.device != x.device:
        raise ValueError(
            f"offsets must be int32 [N + 1] on {x.device}, "
            f"got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        )
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be bool {tuple(x.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    module = _module(choose(
        impl, x.device, IMPLEMENTATIONS, AUTO, lambda name: _module(name).not_supported_reasons(x),
        f"block_pool on {x.device}, {x.dtype}"))
    if x.requires_grad and torch.is_grad_enabled() and impl != "reference":
        return differentiable(module, x, offsets, block, mask)
    return module.run(x, offsets, block=block, mask=mask)


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)
