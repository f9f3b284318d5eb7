"""The gradient of block-sparse attention: one autograd function around every implementation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# forward module -> the module whose `run` turns its output and LSE into gradients; None: its
# operations are differentiable as they stand
BACKWARDS = {
    "gluon_impl": ".triton_backward",
    "triton_impl": ".triton_backward",
    "torch_impl": ".torch_backward",
    "reference": None,
}


class Lists(NamedTuple):
    """The tensors of a call that carry no gradient."""

    indices: Tensor
    counts: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    key_mask: Tensor | None
    weight: Tensor | None
    keep: Tensor | None
    order: Tensor | None


def wanted(query: Tensor, key: Tensor, value: Tensor, tail: tuple[Tensor, ...] | None) -> bool:
    """Whether this call must be differentiable; refuses what has no gradient."""
    if not torch.is_grad_enabled():
        return False
    if tail is not None and tail[2].requires_grad:
        raise ValueError("tail weight requires grad, but it is a count of keys: detach it")
    return any(x.requires_grad for x in (query, key, value, *(tail or ())[:2]))


def differentiable(module: ModuleType) -> Callable[..., Any]:
    """The `run` of an implementation, with gradients for query, key, value and the tail's means.

    The lists, the offsets and the masks are constants. LSE is differentiable too. There is no
    second derivative.
    """
    name = module.__name__.rpartition(".")[2]
    if name not in BACKWARDS:
        raise ValueError(f"{name} has no backward; these have: {', '.join(BACKWARDS)}")
    home = BACKWARDS[name]
    if home is None:
        return module.run
    return partial(_run, module, import_module(home, __package__))


def _run(
    forward: ModuleType,
    backward: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *,
    key_mask: Tensor | None,
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    return_lse: bool,
    order: Tensor | None,
    **sizes: Any,
) -> tuple[Tensor, Tensor | None]:
    key_mean, value_mean, weight, keep = tail or (None, None, None, None)
    lists = Lists(indices, counts, query_offsets, key_offsets, key_mask, weight, keep, order)
    output, lse = _Attention.apply(
        forward, backward, sizes, lists, query, key, value, key_mean, value_mean
    )
    return output, lse if return_lse else None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        forward: ModuleType,
        backward: ModuleType,
        sizes: dict[str, Any],
        lists: Lists,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_mean: Tensor | None,
        value_mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tail = None if key_mean is None else (key_mean, value_mean, lists.weight, lists.keep)
        output, lse = forward.run(
            query, key, value, *lists[:4],
            key_mask=lists.key_mask, tail=tail, return_lse=True, order=lists.order, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(query, key, value, key_mean, value_mean, output, lse, *lists)
        ctx.backward, ctx.sizes = backward, sizes
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if grad is None and grad_lse is None:
            return (None,) * 9
        query, key, value, key_mean, value_mean, output, lse, *rest = ctx.saved_tensors
        lists = Lists(*rest)
        tail = None if key_mean is None else (key_mean, value_mean, lists.weight, lists.keep)
        found = ctx.backward.run(
            torch.zeros_like(output) if grad is None else grad, grad_lse,
            query, key, value, output, lse, *lists[:4],
            key_mask=lists.key_mask, tail=tail, **ctx.sizes,
        )  # fmt: skip
        found = (*found, None, None)[:5]
        needed = ctx.needs_input_grad[4:]
        return (None,) * 4 + tuple(x if n else None for x, n in zip(found, needed, strict=True))
