"""The meaning of tile selection, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor

BINS, REACH = 1024, 8.0


def not_supported_reasons(query: Tensor, key_mean: Tensor, probes: int) -> list[str]:
    return []


def run(
    query: Tensor, key_mean: Tensor, offsets: Tensor, always: Tensor, dense_rows: Tensor, *,
    density: float, probes: int, each_row: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = offsets.diff().float()
    x = log_mass(query, key_mean, offsets, probes)
    step = steps_of_z(x, always, lengths)
    N = lengths.numel()
    own = torch.eye(N, dtype=torch.bool, device=x.device)
    must = own | always[None, :] | dense_rows[:, None]
    first, left = first_step(step, must, density, each_row)
    keep = must | (step >= first)
    if each_row:
        edge = (step == first - 1) & ~must
        keep |= edge & (edge.cumsum(-1) <= left)
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
    step = ((z + REACH) * (BINS / (2 * REACH))).floor().clamp(0, BINS - 1)
    # a NaN is no number of a step
    return step.nan_to_num(0).to(torch.int32)


def first_step(
    step: Tensor, must: Tensor, density: float, each_row: bool = False
) -> tuple[Tensor, Tensor]:
    """The lowest step from which on everything fits into `density`, and how many entries of the
    step below would still fit: [B, 1, 1, 1] each, with `each_row` [B, H, N, 1]."""
    free = (~must).expand_as(step)
    groups = step.flatten(0, 2) if each_row else step.flatten(1)
    free = free.reshape(groups.shape)
    counted = torch.zeros(len(groups), BINS + 1, dtype=torch.float64, device=step.device)
    counted.scatter_add_(1, groups.long(), free.double())
    entries = groups.shape[1]
    # whole tiles a row
    asked = float(int(density * entries + 0.5)) if each_row else density * entries
    room = asked - (entries - free.sum(1, keepdim=True))
    above = counted.flip(-1).cumsum(-1).flip(-1)
    first = (above[:, :BINS] > room).sum(-1, keepdim=True)
    left = room - above.gather(1, first)
    shape = (*step.shape[:3], 1) if each_row else (-1, 1, 1, 1)
    return first.view(shape), left.view(shape)
