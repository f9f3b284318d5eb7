"""Block means in torch operations, deterministic and without reading offsets on the host."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(x: Tensor) -> list[str]:
    return [] if x.is_floating_point() else [f"dtype {x.dtype} is not floating point"]


def run(x: Tensor, offsets: Tensor, *, block: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    B, S, H, D = x.shape
    N = offsets.numel() - 1
    precision = torch.promote_types(x.dtype, torch.float32)
    if N * block == S:
        # blocks of at most `block` tokens can only fill S when each is full
        blocks = x.unflatten(1, (N, block))
        valid = None if mask is None else mask.view(B, N, block)
    else:
        token = offsets[:-1, None].long() + torch.arange(block, device=x.device)
        valid = (token < offsets[1:, None]).expand(B, N, block)
        token = token.clamp(max=max(0, S - 1))
        blocks = x.index_select(1, token.flatten()).unflatten(1, (N, block))
        if mask is not None:
            valid = valid & mask[:, token]
    if valid is None:
        weight = torch.full((B, N), block, dtype=torch.float32, device=x.device)
    else:
        weight = valid.sum(-1, dtype=torch.float32)
        blocks = blocks.masked_fill(~valid[..., None, None], 0)
    mean = blocks.sum(2, dtype=precision) / weight.clamp(min=1).to(precision)[..., None, None]
    return mean.transpose(1, 2).to(x.dtype).contiguous(), weight
