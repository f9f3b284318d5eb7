"""Query, key and value in tile order, and the mean key and value of every tile, in one pass."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

from .backward import Gather

__all__ = ["Tiles", "tile_gather"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl"}
AUTO = ("triton", "torch")


class Tiles(NamedTuple):
    """query, key, value: [B, S, H, D] in tile order. key_mean, value_mean: [B, H, N, D]. weight:
    float32 [B, N], valid tokens of each tile."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_mean: Tensor
    value_mean: Tensor
    weight: Tensor


def tile_gather(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, offsets: Tensor, *, block: int,
    mask: Tensor | None = None, impl: str = "auto",
) -> Tiles:
    """Gather tokens into tile order; on the way, take the means of each tile's keys and values.

    query, key, value: [B, S, H, D] (key and value may have fewer heads), D contiguous. order: int64
    [S], the token at each place of the tile order. offsets: int32 [N + 1], places of each tile.
    block: upper bound of the tile lengths. mask: bool [B, S] in token order; a False token is
    gathered, and left out of the means. Differentiable, but for the weight; once, not twice.
    """
    if query.ndim != 4 or key.shape != value.shape or key.shape[:2] != query.shape[:2]:
        raise ValueError("query, key and value must be [B, S, H, D] of one B and S, got "
                         f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    if order.shape != (query.shape[1],) or order.dtype != torch.int64:
        raise ValueError(f"order must be int64 [{query.shape[1]}], "
                         f"got {order.dtype} {tuple(order.shape)}")
    if offsets.ndim != 1 or offsets.dtype != torch.int32:
        raise ValueError(f"offsets must be int32 [N + 1], got {offsets.dtype}")
    if mask is not None and (mask.shape != query.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(query.shape[:2])}, "
                         f"got {mask.dtype} {tuple(mask.shape)}")
    module = _module(choose(
        impl, query.device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(query, key, value),
        f"tile_gather on {query.device}, {query.dtype}"))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return Tiles(*Gather.apply(module, block, query, key, value, order, offsets, mask))
    return Tiles(*module.run(query, key, value, order, offsets, block=block, mask=mask))


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)
