"""The gradient of gathering into tiles: back by the inverse order, with the share of each mean."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdiff.kernels.block_pool import block_unpool
from fastdiff.kernels.token_permute import unpermute_tokens


class Gather(torch.autograd.Function):
    """`run` of an implementation; all but the weight is differentiable."""

    @staticmethod
    def forward(
        ctx: Any, module: ModuleType, block: int, query: Tensor, key: Tensor, value: Tensor,
        order: Tensor, offsets: Tensor, mask: Tensor | None,
    ) -> tuple[Tensor, ...]:
        found = module.run(query, key, value, order, offsets, block=block, mask=mask)
        ctx.save_for_backward(order, offsets, mask, found[-1])
        ctx.mark_non_differentiable(found[-1])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query: Tensor | None, key: Tensor | None, value: Tensor | None,
        key_mean: Tensor | None, value_mean: Tensor | None, _: Any,
    ) -> tuple[Any, ...]:
        order, offsets, mask, weight = ctx.saved_tensors
        mask = None if mask is None else mask[:, order]
        found: list[Tensor | None] = []
        for tokens, mean in ((query, None), (key, key_mean), (value, value_mean)):
            if mean is not None:
                share = block_unpool(mean, weight, offsets, order.numel(), mask)
                tokens = share if tokens is None else tokens + share
            found.append(None if tokens is None else unpermute_tokens(tokens.contiguous(), order))
        return None, None, *found, None, None, None
