"""Put tokens in another order, and back, exactly."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

from .backward import Permute, wanted

__all__ = ["permute_tokens", "unpermute_tokens"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}
AUTO = ("triton", "torch")


def permute_tokens(x: Tensor, order: Tensor, *, impl: str = "auto") -> Tensor:
    """x[:, order] of x: [B, S, ...]; order: int32 or int64 [S], a permutation of 0 to S - 1."""
    module = _choose(x, order, impl)
    return Permute.apply(module, False, x, order) if wanted(x) else module.permute(x, order)


def unpermute_tokens(x: Tensor, order: Tensor, *, impl: str = "auto") -> Tensor:
    """The inverse: `unpermute_tokens(permute_tokens(x, order), order)` is x, bit for bit."""
    module = _choose(x, order, impl)
    return Permute.apply(module, True, x, order) if wanted(x) else module.unpermute(x, order)


def _choose(x: Tensor, order: Tensor, impl: str) -> ModuleType:
    if x.ndim < 2 or order.shape != (x.shape[1],):
        raise ValueError(
            f"order must have one entry per token: {tuple(order.shape)} for {tuple(x.shape)}"
        )
    if order.dtype not in (torch.int32, torch.int64) or order.device != x.device:
        raise ValueError(
            f"order must be int32 or int64 on {x.device}, got {order.dtype} on {order.device}"
        )
    return _module(choose(
        impl, x.device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(x) if name == "triton" else [],
        f"token_permute on {x.device}"))


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)
