"""Put tokens in another order, and back, exactly."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .backward import Permute, wanted

__all__ = ["permute_tokens", "unpermute_tokens"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}


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
    if impl == "auto":
        impl = "triton" if x.is_cuda and not _refused(x) else "torch"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {list(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "triton" and (reasons := _refused(x)):
        raise ValueError(f"triton cannot permute {tuple(x.shape)}: {', '.join(reasons)}")
    return import_module(IMPLEMENTATIONS[impl], __name__)


def _refused(x: Tensor) -> list[str]:
    module = import_module(IMPLEMENTATIONS["triton"], __name__)
    return module.not_supported_reasons(x)
