"""The meaning of block-sparse attention, written as dense attention under a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """It runs everywhere; it is slow and needs the whole score matrix."""
    return []


def run(
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
    key_mask: Tensor | None,
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
    return_lse: bool,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dense attention under the mask that the lists describe, in float32 (float64 stays)."""
    precision = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[2] // key.shape[2]
    q = query.to(precision).transpose(1, 2)
    k, v = (x.to(precision).transpose(1, 2).repeat_interleave(groups, 1) for x in (key, value))

    # [B, H, Sq, Skv]: a query sees a key when the query's block lists the key's block
    kept = kept_blocks(indices, counts, key_offsets.numel() - 1)
    query_block = block_of_token(query_offsets, q.shape[2])
    key_block = block_of_token(key_offsets, k.shape[2])
    visible = kept[:, :, query_block][..., key_block]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
        # what is masked may be NaN, which a product carries into sums and gradients
        k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores.masked_fill(~visible, -torch.inf)

    # a block that is not kept is one more key: its mean, counted `weight` times
    if tail is not None:
        key_mean, value_mean, weight, keep = tail
        k_mean, v_mean = (
            x.to(precision).repeat_interleave(groups, 1) for x in (key_mean, value_mean)
        )
        pooled = q @ k_mean.mT * scale + weight.to(precision).log()[:, None, None]
        absent = keep | (weight == 0)[:, None, None]
        pooled = pooled.masked_fill(absent[:, :, query_block], -torch.inf)
        scores = torch.cat((scores, pooled), -1)
        v = torch.cat((v, v_mean), -2)

    lse = scores.logsumexp(-1)
    # where nothing is visible every score is -inf, and exp(-inf - 0) is the zero we want
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    output = (probabilities @ v).transpose(1, 2).to(query.dtype).contiguous()
    return output, lse


def kept_blocks(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """The lists as bool [B, H, NQ, NK]."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # what lies beyond the count goes into one extra column, then that column goes
    slots = torch.where(listed, indices, blocks).long()
    kept = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool, device=indices.device)
    return kept.scatter_(-1, slots, True)[..., :blocks]


def block_of_token(offsets: Tensor, tokens: int) -> Tensor:
    """The block number of every token, int64 [tokens]; empty blocks own none."""
    token = torch.arange(tokens, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:].contiguous(), token, right=True)
