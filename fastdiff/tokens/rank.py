"""Ranking of tokens by the attention they receive, and who stands in for the ones dropped."""

import math

import torch
from torch import Tensor

from fastdiff.kernels import token_select
from fastdiff.kernels.column_mass import column_mass, row_lse

# what makes a kept token stand in for a dropped one
ALIKE = ("keys", "attention")
# most entries of a similarity matrix in memory at a time
PAIRS = 1 << 24


def page_rank(
    query: Tensor, key: Tensor, iterations: int, scale: float | None = None
) -> Tensor:
    """Scores per head, float32 (float64) [B, H, S], of mean 1: s <- A^T s from uniform s.

    iterations: how often. query, key: [B, S, H, D] of one self-attention A. One iteration is the
    mean attention that a token receives; the fixed point weighs it by the score of who gives it.
    """
    lse = row_lse(query, key, scale=scale)
    log_score = None
    for _ in range(iterations):
        log_score = column_mass(query, key, lse, log_score, scale=scale)
    assert log_score is not None
    return (log_score + math.log(query.shape[1])).exp()


def aligned(score: Tensor, branches: int) -> Tensor:
    """The mean over the guidance branches of a batch [branches * B, ...], given to each of them.

    Different tokens for the two halves of classifier-free guidance would show as noise, because
    guidance multiplies their difference.
    """
    if branches < 2 or score.shape[0] % branches:
        return score
    parts = score.unflatten(0, (branches, -1))
    return parts.mean(0, keepdim=True).expand_as(parts).flatten(0, 1)


def best(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest of [B, S], ascending, int64 [B, count]; ties: the first."""
    return parted(score, count)[0]


def parted(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`best`, and all other positions, ascending too."""
    return token_select.top_tokens(score, count)


def rest_of(kept: Tensor, tokens: int) -> Tensor:
    """The positions that are not in `kept` [B, K], ascending, int64 [B, tokens - K]."""
    dropped = torch.ones(kept.shape[0], tokens, dtype=torch.int8, device=kept.device)
    dropped.scatter_(1, kept, 0)
    order = dropped.argsort(dim=1, descending=True, stable=True)
    return order[:, : tokens - kept.shape[1]]


def stand_ins(
    query: Tensor, key: Tensor, kept: Tensor, scale: float | None = None,
    dropped: Tensor | None = None, alike: str = "keys",
) -> Tensor:
    """For every token the place in `kept` of the token that stands in for it, int64 [B, S].

    A kept token stands in for itself. A dropped one is represented by the kept token whose key is
    most similar, by the cosine over all heads. alike="attention" takes the one that it attends to
    most: the highest product of probabilities over the heads, which is the highest sum of their
    logits, since a row's softmax denominators are the same for all columns.
    query, key: [B, S, H, D]; kept: int64 [B, K]; dropped: the other positions, where known.
    """
    dropped = rest_of(kept, query.shape[1]) if dropped is None else dropped
    k = key.flatten(2)
    if alike == "attention":
        return token_select.stand_ins(query.flatten(2), k, kept, dropped,
                                      scale=float(scale or query.shape[-1] ** -0.5))
    # the length of the dropped token's own key changes no order
    precision = torch.promote_types(k.dtype, torch.float32)
    length = torch.linalg.vector_norm(k, dim=-1, keepdim=True, dtype=precision)
    return token_select.stand_ins(k, k / length.clamp_min(1e-6).to(k.dtype), kept, dropped)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C] at index [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
