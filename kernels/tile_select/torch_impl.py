"""The meaning of tile selection, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

BINS, REACH = 1024, 8.0


def not_supported_reasons(query: Tensor, key_mean: Tensor, probes: int) -> list[str]:
    return []


def run(
    query: Tensor, key_mean: Tensor, offsets: Tensor, always: Tensor, dense_rows: Tensor, *,
    density: float, probes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = offsets.diff().float()
    x = log_mass(query, key_mean, offsets, probes)
    step = steps_of_z(x, always, lengths)
    N = lengths.numel()
    own = torch.eye(N, dtype=torch.bool, device=x.device)
    must = own | always[None, :] | dense_rows[:, None]
    keep = must | (step >= first_step(step, must, density))
    counts = keep.sum(-1, dtype=torch.int32)
    indices = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True).to(torch.int32)
    length = offsets.diff().long()
    pairs = ((keep * length).sum(-1) * length).sum()
    return keep, indices, counts, pairs


def log_mass(query: Tensor, key_mean: Tensor, offsets: Tensor, probes: int) -> Tensor:
    """Log of the attention that a token of each key tile gets from each query tile, float32
    [B, H, N, N], relative to attention spread evenly over all tokens."""
    B, S, H, D = query.shape
    N = offsets.numel() - 1
    lengths = offsets.diff()
    last = (lengths - 1)[:, None]
    # evenly spaced from the first token to the last; a single probe stands in the middle
    pick = last // 2
    if probes > 1:
        pick = last * torch.arange(probes, device=query.device) // (probes - 1)
    pick = (offsets[:-1, None] + pick).flatten().long()
    q = query.index_select(1, pick).transpose(1, 2).float()
    k = key_mean.float().repeat_interleave(H // key_mean.shape[1], dim=1)
    weight = lengths.float().log()
    parts = []
    # at most 32 M scores at a time
    heads = max(1, (1 << 25) // max(1, B * N * N * probes))
    for begin in range(0, H, heads):
        part = slice(begin, begin + heads)
        scores = q[:, part] @ k[:, part].mT * D**-0.5 + weight
        parts.append(scores.softmax(-1).unflatten(2, (N, probes)).mean(3))
    mass = torch.cat(parts, dim=1)
    return (mass * (S / lengths)).clamp_min(1e-20).log()


def steps_of_z(x: Tensor, always: Tensor, lengths: Tensor) -> Tensor:
    """z of each entry as one of `BINS` equal steps of (-REACH, REACH), int32."""
    weight = ~always * lengths
    weight = weight / weight.sum().clamp_min(1)
    mean = (x * weight).sum(-1, keepdim=True)
    variance = (x.square() * weight).sum(-1, keepdim=True) - mean.square()
    z = (x - mean) * variance.clamp_min(1e-12).rsqrt()
    return ((z + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1).to(torch.int32)


def first_step(step: Tensor, must: Tensor, density: float) -> Tensor:
    """The lowest step, int64 [B, 1, 1, 1], from which on everything fits into `density`."""
    B, entries = step.shape[0], step[0].numel()
    free = (~must).expand_as(step[0]).flatten()
    counted = torch.stack([
        torch.bincount(one.flatten(), weights=free.double(), minlength=BINS) for one in step])
    room = density * entries - (entries - free.sum())
    above = counted.flip(-1).cumsum(-1).flip(-1)
    return (above > room).sum(-1).view(B, 1, 1, 1)
