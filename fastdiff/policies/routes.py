"""Routes of VMoBA: which chunks a query takes beside its own, by top-k or by a threshold."""

import math

import torch
from torch import Tensor

from fastdiff.policies.cuts import best_count, best_mass, level_for_density, mass_above

# what competes for one budget; gates are [B, H, S, C], and a sample never competes with another
GROUPS = {"query": (3,), "block": (2,), "head": (2, 3), "overall": (1, 2, 3)}
# queries of a group that are sorted to find a threshold for a density
SAMPLE = 256


def own_chunk(of_query: Tensor, chunks: int) -> Tensor:
    """bool [S, C]: the chunk of each query. of_query: int64 [S]."""
    return of_query[:, None] == torch.arange(chunks, device=of_query.device)


def route_top_k(gate: Tensor, own: Tensor, group: str, others: int | float) -> Tensor:
    """The best `others` chunks a query has, on average over its group, besides its own.

    gate: float32 [B, H, S, C]. own: bool [S, C]. A group shares its budget; with the group "block"
    every chunk takes as many queries. Returns bool like gate.
    """
    if group == "query":
        others = min(round(others), gate.shape[-1] - 1)
        best = gate.masked_fill(own, -torch.inf).topk(others, dim=-1).indices
        return torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best, True)
    dims = GROUPS[group]
    share = math.prod(gate.shape[dim] for dim in dims) / gate.shape[-1]
    budget = (others + 1) * share - own.expand_as(gate).sum(dims, keepdim=True)
    return best_count(gate, ~own, budget.round().clamp_min(0).long(), dims)


def route_threshold(gate: Tensor, own: Tensor, group: str, tau: Tensor | float) -> Tensor:
    """The fewest best chunks that, with the own ones, hold the share `tau` of similarity.

    Similarity is the gate, min-max normalised in its group. At least one chunk besides the own ones
    is taken in each group; tau of 1 or more takes all. tau: a number, or float32 [B, 1, 1, 1].
    """
    dims = GROUPS[group]
    share, held = similarity(gate, own, dims)
    tau = torch.as_tensor(tau, device=gate.device)
    route = best_mass(share, ~own, (tau - held).clamp_min(0), dims)
    return (route | _best(share.masked_fill(own, -1), dims) | (tau >= 1)) & ~own


def _best(scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The one highest entry of each group, bool like scores."""
    flat = scores.flatten(dims[0], dims[-1])
    found = torch.zeros_like(flat, dtype=torch.bool)
    found.scatter_(dims[0], flat.argmax(dims[0], keepdim=True), True)
    return found.view_as(scores)


def similarity(gate: Tensor, own: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Each entry's share of its group's min-max normalised gates, and the share of own entries."""
    low, high = gate.amin(dims, keepdim=True), gate.amax(dims, keepdim=True)
    spread = high - low
    normal = (gate - low) / torch.where(spread <= 1e-6, torch.ones_like(spread), spread)
    share = normal / (normal.sum(dims, keepdim=True) + 1e-6)
    return share, share.masked_fill(~own, 0).sum(dims, keepdim=True)


def tau_for_density(
    gate: Tensor, own: Tensor, group: str, sizes: Tensor, density: float
) -> Tensor:
    """The threshold, [B, 1, 1, 1], at which a sample keeps about `density` of the pairs.

    sizes: float32 [C], tokens of each chunk. Judged from at most SAMPLE evenly spaced queries.
    """
    step = max(1, gate.shape[2] // SAMPLE)
    gate, own = gate[:, :, ::step], own[::step]
    dims = GROUPS[group]
    share, held = similarity(gate, own, dims)
    candidate = (~own).expand_as(gate)
    if group == "query":
        reach = mass_above(share, candidate)
    elif group == "block":
        reach = mass_above(share.mT, candidate.mT).mT
    else:
        flat = dims[0], 3
        reach = mass_above(share.flatten(*flat), candidate.flatten(*flat)).view_as(share)
    reach = (reach + held).masked_fill(own, -1.0)
    return level_for_density(reach, own, sizes / sizes.sum(), density)
