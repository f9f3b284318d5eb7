"""Normalised linear attention, not causal: its cost grows with the tokens, not their square."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

__all__ = ["implementations", "linear_attention"]

# name -> module, most wanted first; "auto" walks AUTO in this order
IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl", "reference": ".reference"}
AUTO = ("triton", "torch")


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-4, impl: str = "auto"
) -> Tensor:
    """phi(q) (phi(k)^T v / S) / (phi(q) . mean(phi(k)) + eps), with phi(u) = elu(u) + 1.

    query: [B, Sq, H, D]; key, value: [B, S, H, D]. Any strides, D contiguous.
    eps: added to the denominator.
    returns: [B, Sq, H, D] in query's dtype. All sums are float32 (float64 for float64 input); the
        Triton kernel rounds features and the state phi(k)^T v / S to the input's dtype for its
        products, so these must be in range. Every key counted twice changes nothing.

    4 B S H D^2 floating-point operations, one D x D state a head. Only "torch" and "reference"
    can be differentiated; "auto" takes torch where gradients are wanted. Source: the operator of
    LinFusion (arXiv 2409.02097).
    """
    _check(query, key, value, eps)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    module = _choose(impl, query.device, query.dtype, query.shape[-1], wanted)
    return module.run(query, key, value, eps=eps)


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


def _choose(
    impl: str, device: torch.device, dtype: torch.dtype, head_dim: int, gradients: bool
) -> ModuleType:
    def reasons(name: str) -> list[str]:
        found = _module(name).not_supported_reasons(device, dtype, head_dim)
        if gradients and name == "triton":
            return [*found, "gradients are wanted, and it has no backward"]
        return found

    return _module(choose(impl, device, IMPLEMENTATIONS, AUTO, reasons,
                          f"linear_attention on {device}, {dtype}, head_dim={head_dim}"))


def _check(query: Tensor, key: Tensor, value: Tensor, eps: float) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be [B, Sq, H, D] and key, value one [B, S, H, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if key.shape[1] == 0:
        raise ValueError("linear attention needs at least one key")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"devices differ: {query.device}, {key.device}, {value.device}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, strides {x.stride()}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
