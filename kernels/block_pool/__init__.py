"""Means of the tokens of every block."""

import torch
from torch import Tensor

__all__ = ["block_pool"]


def block_pool(
    x: Tensor, offsets: Tensor, *, block: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x: [B, S, H, D]; offsets: int32 [N + 1]; mask: bool [B, S]. -> mean, weight."""
    B, S, H, D = x.shape
    N = offsets.numel() - 1
    slot = offsets[:-1, None].long() + torch.arange(block, device=x.device)
    valid = (slot < offsets[1:, None]).expand(B, N, block)
    slot = slot.clamp_max(S - 1)
    if mask is not None:
        valid = valid & mask[:, slot]
    weight = valid.sum(-1).float()
    tokens = x[:, slot.flatten()].view(B, N, block, H, D).float()
    mean = (tokens * valid[..., None, None]).sum(2) / weight.clamp_min(1)[..., None, None]
    return mean.to(x.dtype).transpose(1, 2).contiguous(), weight
