"""Which tokens stay, and who stands in for each that goes: a top-k in order, and a nearest one."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

__all__ = ["implementations", "stand_ins", "top_tokens"]

# name -> module, most wanted first; "auto" walks AUTO in this order
IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}
AUTO = ("triton", "torch")


def top_tokens(score: Tensor, count: int, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Positions of the `count` highest of score [B, S], and the other positions.

    score: any floating dtype; of equal scores the first ones win, and NaN is above all.
    count: from 0 to S.
    returns: int64 [B, count] and [B, S - count], both ascending.
    """
    if score.ndim != 2 or not score.is_floating_point():
        raise ValueError(f"score must be floating [B, S], got {score.dtype} {tuple(score.shape)}")
    if not 0 <= count <= score.shape[1]:
        raise ValueError(f"count must be from 0 to {score.shape[1]}, got {count}")
    module = _choose(impl, score.device, score.dtype, score.shape[1])
    return module.top_tokens(score, count)


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, *, scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """For every token the place in `kept` of the token that stands for it, int64 [B, S].

    A kept token stands for itself, a dropped one is represented by the kept token whose key has
    the highest product with its query; of equal ones by the first.
    query, key: [B, S, C], any strides, C contiguous. kept, dropped: int64 [B, K] with K at least 1
        and [B, S - K], together every position once; their values are trusted.
    scale: over 0, of the products; they may be rounded to the dtype of query, where it keeps half
        precision in range.

    One product of dropped queries with kept keys; the Triton kernel never stores it.
    """
    _check(query, key, kept, dropped, scale)
    module = _choose(impl, query.device, query.dtype, 0)
    return module.stand_ins(query, key, kept, dropped, scale)


def implementations(device: torch.device | str, dtype: torch.dtype) -> dict[str, list[str]]:
    """Every implementation by name, with the reasons why it cannot run here (none: usable)."""
    device = torch.device(device)
    return {name: _module(name).not_supported_reasons(device, dtype, 0)
            for name in IMPLEMENTATIONS}


def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)


def _choose(impl: str, device: torch.device, dtype: torch.dtype, tokens: int) -> ModuleType:
    name = choose(
        impl, device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(device, dtype, tokens),
        f"token_select on {device}, {dtype}, {tokens} tokens")
    return _module(name)


def _check(query: Tensor, key: Tensor, kept: Tensor, dropped: Tensor, scale: float) -> None:
    if query.ndim != 3 or query.shape != key.shape or query.dtype != key.dtype:
        raise ValueError(
            "query and key must be [B, S, C] of one dtype, got "
            f"{query.dtype} {tuple(query.shape)} and {key.dtype} {tuple(key.shape)}")
    batch, tokens, width = query.shape
    for name, x in (("query", query), ("key", key)):
        if x.stride(-1) != 1 and width > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, strides {x.stride()}")
    for name, x in (("kept", kept), ("dropped", dropped)):
        if x.ndim != 2 or x.shape[0] != batch or x.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [{batch}, ...], got {x.dtype} "
                             f"{tuple(x.shape)}")
    if kept.shape[1] < 1 or kept.shape[1] + dropped.shape[1] != tokens:
        raise ValueError(f"kept and dropped must be the {tokens} positions, one kept at least, got "
                         f"{kept.shape[1]} and {dropped.shape[1]}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
