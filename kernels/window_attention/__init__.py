"""Attention in which every token of a 3-D grid sees its own window of the grid, and all text."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .geometry import Grid, Window

__all__ = ["Window", "chosen", "implementations", "window_attention"]

# name -> module, most wanted first; "auto" walks AUTO in this order
IMPLEMENTATIONS = {"gluon": ".gluon_impl", "triton": ".triton_impl", "reference": ".reference"}
AUTO = ("gluon", "triton")


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, *, grid: Grid, window: Grid,
    stride: Grid = (1, 1, 1), causal: tuple[bool, bool, bool] = (False, False, False),
    before: int = 0, key_mask: Tensor | None = None, scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of every token over the `window` tokens of each axis around it.

    query: [B, S, H, D]; key, value: [B, S, Hk, D] with Hk dividing H. Any strides, D contiguous.
        `before` tokens, then the grid (frames, height, width) in raster order, then all others.
        What is not in the grid is seen by every query, and its queries see everything.
    window: tokens seen on each axis, at most the axis; windows shift inward at borders, so that
        every query sees equally many. An even one reaches one further to the left.
    stride: so many neighbours along an axis share the window of their middle token.
    causal: axes on which a window ends at its query; there it may hold fewer tokens.
    key_mask: bool [B, S]; a False key counts for nobody. It must be finite all the same.
    returns: [B, S, H, D] in query's dtype. A query without any key gets zeros.

    Nothing is permuted and no list or mask is made. Each tile of queries, a box of the grid, walks
    the box that its windows cover in boxes of keys; those that every query of the tile sees whole
    need no mask. Gradients: the reference only. Sources: arXiv 2204.07143 (window), 2504.16922
    (stride).
    """
    found = Window(grid, window, stride, causal)
    _check(query, key, value, found, before, key_mask)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    name = chosen(query, key, value, impl=impl)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if wanted and name != "reference":
        raise ValueError(f"window_attention has no gradients with impl={name!r}; detach the "
                         "inputs, or take impl='reference'")
    module = _module(name)
    return module.run(query, key, value, found, before=before, key_mask=key_mask, scale=scale)


def chosen(query: Tensor, key: Tensor, value: Tensor, *, impl: str = "auto") -> str:
    """The implementation that `window_attention` takes for this call.

    Raises ValueError, with every reason, where none can run it. A name is taken at its word.
    """
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {list(IMPLEMENTATIONS)}, got {impl!r}")
    refused = {}
    for name in AUTO if impl == "auto" else (impl,):
        reasons = _module(name).not_supported_reasons(query, key, value)
        # an interpreted kernel on the CPU is for tests, so only its own name selects it
        if impl == "auto" and query.device.type == "cpu":
            reasons = reasons or ["interpreted kernels run when named"]
        if not reasons:
            return name
        refused[name] = reasons
    told = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items())
    raise ValueError(f"no implementation of window_attention for {query.dtype} {tuple(query.shape)}"
                     f" on {query.device} ({told}); impl='reference' runs anywhere, slowly")


def implementations(query: Tensor, key: Tensor, value: Tensor) -> dict[str, list[str]]:
    """Every implementation by name, with the reasons why it cannot run these (none: usable)."""
    return {name: _module(name).not_supported_reasons(query, key, value)
            for name in IMPLEMENTATIONS}


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)


def _check(
    query: Tensor, key: Tensor, value: Tensor, window: Window, before: int, key_mask: Tensor | None
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError("query must be [B, S, H, D] and key, value one [B, S, Hk, D], got "
                         f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}")
    B, S, H, D = query.shape
    Hk = key.shape[2]
    if key.shape[:2] != (B, S) or key.shape[3] != D or Hk == 0 or H % Hk:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 and D > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, strides {x.stride()}")
    if before < 0 or before + window.tokens > S:
        raise ValueError(f"before={before} and the {window.tokens} tokens of the grid "
                         f"{window.grid} do not fit into {S} tokens")
    if key_mask is not None and (
            key_mask.shape != (B, S) or key_mask.dtype != torch.bool
            or key_mask.device != query.device):
        raise ValueError(f"key_mask must be bool {(B, S)} on {query.device}, got {key_mask.dtype} "
                         f"{tuple(key_mask.shape)} on {key_mask.device}")
