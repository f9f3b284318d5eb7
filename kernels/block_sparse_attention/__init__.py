"""Attention over lists of kept key blocks, with an optional pooled tail for the blocks not kept."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

from . import backward

__all__ = ["block_sparse_attention", "chosen", "implementations", "probe", "refused"]

Tail = tuple[Tensor, Tensor, Tensor, Tensor]

# name -> module, most wanted first; "auto" walks AUTO in this order
IMPLEMENTATIONS = {"gluon": ".gluon_impl", "triton": ".triton_impl", "torch": ".torch_impl",
                   "reference": ".reference"}
AUTO = ("gluon", "triton", "torch")


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *,
    block_q: int,
    block_k: int,
    key_mask: Tensor | None = None,
    tail: Tail | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    order: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query block `i` sees only the key blocks in its list.

    query: [B, Sq, H, D]; key, value: [B, Skv, Hk, D] with Hk dividing H. Any strides, D contiguous.
    indices: int32 [B, H, NQ, M]; counts: int32 [B, H, NQ]. The first `counts` entries of a row are
        distinct key block numbers; the rest is never read.
    query_offsets, key_offsets: int32 [NQ + 1], [NK + 1], from 0 to the sequence length,
        not falling, contiguous. Block `i` owns tokens `offsets[i]` to `offsets[i + 1]`; a block may
        be empty.
    block_q, block_k: upper bounds of the block lengths.
    key_mask: bool [B, Skv]; a False key counts for nobody.
    tail: (key_mean [B, Hk, NK, D], value_mean [B, Hk, NK, D], weight float32 [B, NK],
        keep bool [B, H, NQ, NK]). A block with `keep` False enters the same softmax as one key,
        its mean, whose score is raised by log(weight); weight 0 adds nothing.
    order: int32 [B * H * NQ], each row number once: rows in the order in which a GPU is to begin
        them (`row_order.late_first`). It changes no result; its values are trusted like those of
        the lists.
    returns: [B, Sq, H, D] in query's dtype; with `return_lse` also the natural log of the
        denominator, float32 [B, H, Sq]. A query with no key at all gets zeros and -inf.

    The values of indices, counts and offsets are trusted: reading them would stall the device.
    Differentiable in query, key, value and the tail's means, also through LSE; once, not twice.
    """
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1])
    known = module = None
    if query.is_cuda:
        tensors = (query, key, value, indices, counts, query_offsets, key_offsets, key_mask,
                   *(tail or ()), *(() if order is None else (order,)))
        known = (impl, block_q, block_k, scale, tail is None, *map(_looks, tensors))
        module = _chosen.get(known)
    if module is None:
        _check(query, key, value, indices, counts, query_offsets, key_offsets, key_mask, tail)
        _check_order(order, counts)
        if block_q < 1 or block_k < 1:
            raise ValueError(f"block_q and block_k must be positive, got {block_q} and {block_k}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        module = _module(chosen(query, key, value, block_q=block_q, block_k=block_k,
                                key_mask=key_mask, tail=tail, impl=impl))
        if known is not None:
            if len(_chosen) >= CALLS:
                _chosen.clear()
            _chosen[known] = module
    wanted = backward.wanted(query, key, value, tail)
    run = backward.differentiable(module) if wanted else module.run
    output, lse = run(
        query,
        key,
        value,
        indices,
        counts,
        query_offsets,
        key_offsets,
        block_q=block_q,
        block_k=block_k,
        key_mask=key_mask,
        tail=tail,
        scale=scale,
        return_lse=return_lse,
        order=order,
    )
    return (output, lse) if return_lse else output


# calls on a GPU by all that their checks look at, and what runs them: checking costs host time
_chosen: dict[tuple, ModuleType] = {}
CALLS = 512


def _looks(x: Tensor | None) -> tuple | None:
    return None if x is None else (
        x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16)


def chosen(
    query: Tensor, key: Tensor, value: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None = None, tail: Tail | None = None, impl: str = "auto",
) -> str:
    """The implementation that `block_sparse_attention` takes for this call.

    Raises ValueError, with every reason, where none can run it. A name is taken at its word.
    """
    device, dtype, head_dim = query.device, query.dtype, query.shape[-1]
    return choose(impl, device, IMPLEMENTATIONS, AUTO,
                  lambda name: refused(name, query, key, value, block_q=block_q, block_k=block_k,
                                       key_mask=key_mask, tail=tail),
                  f"block_sparse_attention on {device}, {dtype}, head_dim={head_dim}")


def refused(
    name: str, query: Tensor, key: Tensor, value: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None = None, tail: Tail | None = None,
) -> list[str]:
    """Why the implementation of this name cannot run this call; nothing means that it can."""
    module = _module(name)
    found = module.not_supported_reasons(query.device, query.dtype, query.shape[-1])
    refusal = getattr(module, "refusal", None)
    if found or refusal is None:
        return found
    told = refusal(query, key, value, block_q=block_q, block_k=block_k, key_mask=key_mask,
                   tail=tail)
    return [told] if told else []


def implementations(
    device: torch.device | str, dtype: torch.dtype, head_dim: int
) -> dict[str, list[str]]:
    """Every implementation by name, with the reasons why it cannot run here (none: usable)."""
    device = torch.device(device)
    return {
        name: _module(name).not_supported_reasons(device, dtype, head_dim)
        for name in IMPLEMENTATIONS
    }


def probe(impl: str, device: torch.device | str) -> str | None:
    """Run a tiny case with `impl` on `device`; None when it is right, else what went wrong."""
    # the Hopper kernel takes half precision and large query blocks only
    block, dtype, most = (128, torch.float16, 5e-3) if impl == "gluon" else (
        16, torch.float32, 1e-4)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 3 * block, 2, 32, generator=generator).to(device, dtype)
               for _ in range(3))
    offsets = torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device) * block
    indices = torch.tensor([[0, 2], [1, 0], [2, 1]], dtype=torch.int32, device=device)
    indices = indices.expand(1, 2, 3, 2).contiguous()
    counts = torch.tensor([2, 1, 2], dtype=torch.int32, device=device).expand(1, 2, 3).contiguous()

    def run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = block_sparse_attention(q, k, v, indices, counts, offsets, offsets, block_q=block,
                                       block_k=block, impl=name)
        return found[0] if isinstance(found, tuple) else found

    try:
        found = run(impl, q, k, v)
    except Exception as error:  # a probe reports whatever a compiler or driver throws
        return f"{type(error).__name__}: {error}"
    wanted = run("reference", q.float(), k.float(), v.float())
    error = (found - wanted).abs().max().item()
    return None if error < most else f"wrong result, largest error {error:.3g}"


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)


def _check(query, key, value, indices, counts, query_offsets, key_offsets, key_mask, tail) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be [B, Sq, H, D] and key, value one [B, Skv, Hk, D], got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    B, _, H, D = query.shape
    _, Skv, Hk, _ = key.shape
    if key.shape[0] != B or key.shape[3] != D or Hk == 0 or H % Hk:
        raise ValueError(f"key {tuple(key.shape)} does not fit query {tuple(query.shape)}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.device == key.device == value.device:
        raise ValueError(f"devices differ: {query.device}, {key.device}, {value.device}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.stride(-1) != 1 and D > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, strides {x.stride()}")
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    _expect("counts", counts, (B, H, NQ), torch.int32, query)
    _expect("indices", indices, (B, H, NQ, indices.shape[-1]), torch.int32, query)
    _expect("query_offsets", query_offsets, (NQ + 1,), torch.int32, query)
    _expect("key_offsets", key_offsets, (NK + 1,), torch.int32, query)
    for name, x in (("query_offsets", query_offsets), ("key_offsets", key_offsets)):
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, strides {x.stride()}")
    if key_mask is not None:
        _expect("key_mask", key_mask, (B, Skv), torch.bool, query)
    if tail is not None:
        key_mean, value_mean, weight, keep = tail
        _expect("tail key_mean", key_mean, (B, Hk, NK, D), query.dtype, query)
        _expect("tail value_mean", value_mean, (B, Hk, NK, D), query.dtype, query)
        _expect("tail weight", weight, (B, NK), torch.float32, query)
        _expect("tail keep", keep, (B, H, NQ, NK), torch.bool, query)


def _expect(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, query: Tensor
) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != query.device:
        raise ValueError(
            f"{name} must be {dtype} {shape} on {query.device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )


def _check_order(order: Tensor | None, counts: Tensor) -> None:
    if order is None:
        return
    if order.shape != (counts.numel(),) or order.dtype != torch.int32 \
            or order.device != counts.device or not order.is_contiguous():
        raise ValueError(f"order must be contiguous int32 [{counts.numel()}] on {counts.device}, "
                         f"got {order.dtype} {tuple(order.shape)} on {order.device}")
