"""Attention that every key receives: the log of A^T s, with no attention map in memory."""

from __future__ import annotations

import math
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

__all__ = ["column_mass", "implementations", "row_lse"]

# name -> module, most wanted first; "auto" walks AUTO in this order
IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}
AUTO = ("triton", "torch")


def column_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor | None = None,
    log_weight: Tensor | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """log(A^T s), where A = softmax(scale * query key^T) has one row per query.

    query: [B, Sq, H, D]; key: [B, Sk, Hk, D] with Hk dividing H. Any strides, D contiguous.
    lse: float32 [B, H, Sq], natural log of the softmax denominators of A over these keys; None
        computes it in a pass of its own.
    log_weight: float32 [B, H, Sq], log of s, the weight of every query; -inf leaves a query out.
        None weighs all the same, 1 / Sq.
    returns: float32 [B, H, Sk] (float64 for float64 input). Its exponentials sum to the sum of s.

    Range: the Triton kernel sums probabilities times weights, over the largest weight of their
    head, without a running maximum. Each is at most 1 when `lse` is right. Terms below 2^-190 do
    not count, so a key that receives less than that of every query has mass -inf there; above it
    the result is as exact as elsewhere.

    Attention with the roles of queries and keys exchanged and no values: half the products of one
    attention forward. Source: the page rank of AT-EDM (arXiv 2405.05252) and Zero-TPrune
    (arXiv 2305.17328), computed from the denominators that an attention forward already knows.
    """
    _check(query, key, lse, log_weight)
    scale = _scale(scale, query)
    module = _choose(impl, query.device, query.dtype, query.shape[-1])
    if lse is None:
        lse = module.row_lse(query, key, scale=scale)
    return module.column_mass(query, key, lse, log_weight, scale=scale)


def row_lse(
    query: Tensor, key: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Log of the softmax denominator of every query, [B, H, Sq]; shapes as in `column_mass`."""
    _check(query, key, None, None)
    module = _choose(impl, query.device, query.dtype, query.shape[-1])
    return module.row_lse(query, key, scale=_scale(scale, query))


def implementations(
    device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> dict[str, list[str]]:
    """Every implementation by name, with the reasons why it cannot run here (none: usable)."""
    device = torch.device(device)
    return {
        name: _module(name).not_supported_reasons(device, dtype, head_dim)
        for name in IMPLEMENTATIONS
    }


def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)


def _choose(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> ModuleType:
    name = choose(
        impl, device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(device, dtype, head_dim),
        f"column_mass on {device}, {dtype}, head_dim={head_dim}")
    return _module(name)


def _scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return 1 / math.sqrt(query.shape[-1])
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def _check(query: Tensor, key: Tensor, lse: Tensor | None, log_weight: Tensor | None) -> None:
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(
            "query must be [B, Sq, H, D] and key [B, Sk, Hk, D], got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    B, Sq, H, D = query.shape
    Hk = key.shape[2]
    if key.shape[0] != B or key.shape[3] != D or Hk == 0 or H % Hk:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if Sq == 0 or key.shape[1] == 0:
        raise ValueError("column mass needs at least one query and one key")
    if query.dtype != key.dtype or query.device != key.device:
        raise ValueError(
            f"query and key differ: {query.dtype} on {query.device}, {key.dtype} on {key.device}"
        )
    for name, x in (("query", query), ("key", key)):
        if x.stride(-1) != 1 and D > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, strides {x.stride()}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and there is no backward")
    wanted = torch.promote_types(query.dtype, torch.float32)
    for name, x in (("lse", lse), ("log_weight", log_weight)):
        if x is None:
            continue
        if tuple(x.shape) != (B, H, Sq) or x.dtype != wanted or x.device != query.device:
            raise ValueError(
                f"{name} must be {wanted} {(B, H, Sq)} on {query.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
