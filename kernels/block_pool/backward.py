"""The gradient of block pooling: every valid token gets its block's, divided by the weight."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable(
    module: ModuleType, x: Tensor, offsets: Tensor, block: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean and weight by an implementation; the mean has a gradient, the weight is a count."""
    return _Pool.apply(module, x, offsets, block, mask)


def block_unpool(
    grad: Tensor, weight: Tensor, offsets: Tensor, tokens: int, mask: Tensor | None
) -> Tensor:
    """Gradient of x, [B, tokens, H, D], of a gradient of the means, [B, H, N, D]."""
    precision = torch.promote_types(grad.dtype, torch.float32)
    share = grad.to(precision) / weight.clamp(min=1).to(precision)[:, None, :, None]
    token = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    own = torch.searchsorted(offsets[1:].contiguous(), token, right=True)
    found = share.to(grad.dtype).transpose(1, 2).index_select(1, own)
    return found if mask is None else found.masked_fill_(~mask[:, :, None, None], 0)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, x: Tensor, offsets: Tensor, block: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        mean, weight = module.run(x, offsets, block=block, mask=mask)
        ctx.save_for_backward(offsets, mask, weight)
        ctx.tokens = x.shape[1]
        ctx.mark_non_differentiable(weight)
        return mean, weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        offsets, mask, weight = ctx.saved_tensors
        return None, block_unpool(grad, weight, offsets, ctx.tokens, mask), None, None, None
