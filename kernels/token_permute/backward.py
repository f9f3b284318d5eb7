"""The gradient of a permutation: the permutation back, a gather like the forward."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def wanted(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


class Permute(torch.autograd.Function):
    """`permute` of an implementation, or `unpermute` when `back`."""

    @staticmethod
    def forward(ctx: Any, module: ModuleType, back: bool, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.module, ctx.back = module, back
        return module.unpermute(x, order) if back else module.permute(x, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (order,) = ctx.saved_tensors
        # an expanded gradient, as of a sum, is no row of numbers
        return None, None, Permute.apply(ctx.module, not ctx.back, grad.contiguous(), order), None
