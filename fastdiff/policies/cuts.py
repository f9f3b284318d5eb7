"""Cuts through a map of scores, found by bisection: the n best entries, or the best share of mass.

A sort of such a map costs more than the attention it is for. Bisection on the bit pattern of the
numbers ends at the exact value of one entry, in passes that only compare and add.
"""

import torch
from torch import Tensor


def best_count(scores: Tensor, candidate: Tensor, count: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The `count` highest candidates of each group, bool like scores; ties come in together.

    scores: float32. candidate: bool, broadcasts. count: int64, one for each group: its shape is
    that of scores with `dims`, the dimensions of a group, of size 1.
    """
    # integers in the order of the floats, which negative ones have the wrong way round
    bits = scores.contiguous().view(torch.int32)
    rank = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = torch.where(candidate, rank, -(1 << 31))
    count = torch.minimum(count, candidate.expand_as(scores).sum(dims, keepdim=True))
    low = torch.full_like(count, -(1 << 31))
    high = torch.full_like(count, (1 << 31) - 1)
    # the highest cut that leaves at least `count` entries at or above it
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = (rank >= middle.to(torch.int32)).sum(dims, keepdim=True) >= count
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)
    return (rank >= low.to(torch.int32)) & candidate & (count > 0)


def best_mass(
    mass: Tensor, candidate: Tensor, need: Tensor, dims: tuple[int, ...], passes: int = 31
) -> Tensor:
    """The fewest candidates of each group, best first, that hold `need` together; bool like mass.

    mass: float32, 0 or more. need: float32, one for each group as in `best_count`; 0 takes none.
    All are taken where even all of them hold less. passes: 31 tells any two numbers apart; with 16
    those within 0.8 % of the last one may come in with it.
    """
    mass = mass.masked_fill(~candidate, 0).contiguous()
    bits = mass.view(torch.int32) >> (31 - passes)
    low = torch.zeros(need.shape, dtype=torch.int64, device=mass.device)
    high = torch.full_like(low, 0x7F7FFFFF >> (31 - passes))
    for _ in range(passes):
        middle = (low + high + 1) >> 1
        held = mass.masked_fill(bits < middle.to(torch.int32), 0).sum(dims, keepdim=True)
        enough = held >= need
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)
    return (bits >= low.to(torch.int32)) & candidate & (need > 0)


def mass_above(mass: Tensor, candidate: Tensor) -> Tensor:
    """Mass of the better candidates of each row, float32 like mass; by a sort, for small samples.

    An entry is in the fewest that hold `need` exactly where this is below `need`. Entries that are
    no candidates get infinity.
    """
    ordered, index = mass.masked_fill(~candidate, -1).sort(-1, descending=True)
    ordered = ordered.clamp_min(0)
    above = torch.empty_like(mass).scatter_(-1, index, ordered.cumsum(-1) - ordered)
    return above.masked_fill(~candidate, torch.inf)


def level_for_density(
    reach: Tensor, kept: Tensor, weight: Tensor, density: Tensor | float
) -> Tensor:
    """The level, float32 [B, 1, 1, 1], below which entries of `reach` make up `density`.

    reach: [B, H, R, C]. kept: bool, broadcasts, entries that count anyhow. weight: [C], share of
    the pairs of a row that an entry stands for; all rows count alike.
    """
    shape = (reach.shape[0], 1, 1, 1)
    low, high = reach.new_zeros(shape), reach.new_ones(shape)
    for _ in range(16):
        middle = (low + high) / 2
        found = (((reach < middle) | kept).float() @ weight).mean((1, 2)).view(shape)
        low = torch.where(found < density, middle, low)
        high = torch.where(found < density, high, middle)
    return (low + high) / 2
