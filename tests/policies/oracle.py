"""Attention under any mask, written out, and the pairs that a policy keeps."""

# pyright: basic

from typing import Any

import torch
from torch import Tensor

from fastdiff.clock import StepClock
from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Context, Policy, Terms

PLAIN = Terms()


def context_of(layout: TokenLayout, layer: int = 0, seed: int = 0) -> Context:
    return Context(layout, StepClock(), layer, seed)


def masked(query: Tensor, key: Tensor, value: Tensor, keep: Tensor, scale=None) -> Tensor:
    """All [B, S, H, D]; keep: bool, broadcasts to [B, H, S, S], rows may be empty."""
    groups = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (scale or query.shape[-1] ** -0.5)
    scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num(0).matmul(v).transpose(1, 2)


def run(
    policy: Policy, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, layer: int = 0,
    terms: Terms = PLAIN,
) -> tuple[Tensor, float]:
    """Output in raster order and density, the way the op drives a policy; without the tail."""
    context = context_of(layout, layer)
    attended = policy.attend(query, key, value, context, terms)
    if attended is not None:
        return attended.output, float(attended.density)
    tiles = policy.tiles(layout, query, context)
    q, k, v = (x[:, tiles.order] for x in (query, key, value))
    mask = policy.select(q, k, tiles, context)
    assert mask is not None
    key_mask = None if terms.key_mask is None else terms.key_mask[:, tiles.order]
    out: Any = block_sparse_attention(
        q, k, v, *mask.lists(), tiles.offsets, tiles.offsets, block_q=tiles.block,
        block_k=tiles.block, key_mask=key_mask, scale=terms.scale)
    return out[:, tiles.inverse], float(mask.density())


def kept(
    policy: Policy, query: Tensor, key: Tensor, layout: TokenLayout, layer: int = 0
) -> Tensor:
    """bool [B, H, S, S] in raster order: which values reach which outputs."""
    batch, tokens, heads, width = key.shape
    seen = []
    for begin in range(0, tokens, width):
        value = torch.zeros_like(key)
        span = torch.arange(begin, min(tokens, begin + width))
        value[:, span, :, span - begin] = 1
        out, _ = run(policy, query, key, value, layout, layer)
        seen.append(out.transpose(1, 2)[..., : len(span)] > 0)
    return torch.cat(seen, -1)


def qkv(layout: TokenLayout, batch=1, heads=2, width=8, kv_heads=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    return tuple(
        torch.randn(batch, layout.tokens, n, width, generator=generator, dtype=dtype)
        for n in (heads, kv_heads, kv_heads)
    )


def gradients(out: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum of the output."""
    weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    return torch.autograd.grad((out * weight).sum(), leaves)
