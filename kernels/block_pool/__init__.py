"""Mean of the tokens of every block."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from .backward import block_unpool, differentiable

__all__ = ["block_pool", "block_unpool"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}


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
    if impl == "auto":
        triton = import_module(IMPLEMENTATIONS["triton"], __name__)
        usable = x.device.type == "cuda" and not triton.not_supported_reasons(x)
        impl = "triton" if usable else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {list(IMPLEMENTATIONS)}, got {impl!r}")
    module = import_module(IMPLEMENTATIONS[impl], __name__)
    if reasons := module.not_supported_reasons(x):
        raise ValueError(f"{impl} cannot pool {x.dtype} on {x.device}: {', '.join(reasons)}")
    if x.requires_grad and torch.is_grad_enabled() and impl != "reference":
        return differentiable(module, x, offsets, block, mask)
    return module.run(x, offsets, block=block, mask=mask)
