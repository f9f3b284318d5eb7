"""ZeroTPrune: drop what a more important token resembles, then what receives little attention."""

from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
from torch import Tensor

from fastdiff.method import check
from fastdiff.tokens.prune import Pruner
from fastdiff.tokens.rank import PAIRS, aligned, best, page_rank, parted, rest_of, rows, stand_ins


@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(Pruner):
    """The pruner of `at-edm` with the ranking of Zero-TPrune: importance, similarity, importance.

    First a single vote (mean attention received) orders the tokens. Then every token of the less
    important half looks for the most similar one of the other half, by the cosine of their keys,
    and the most similar `similar` of all that are to go are dropped: what is alike goes before
    what is quiet, so a plain background keeps some tokens. Then a page rank on the tokens that are
    left drops the rest.

    similar: share of the dropped tokens that the similarity stage drops, 0 to 1.
    iterations: applications of the last page rank.
    least, most: heads whose scores, scaled to a mean of 1, have a variance outside of these do not
        vote in the last stage; where no head is left, all do.

    Heads are put together by their root mean square, so that a token that matters much to one head
    is not averaged away. Cost: `at-edm`, one more ranking of fewer tokens, and a product of half
    of the keys with the other half. Source: Zero-TPrune (arXiv 2305.17328). Not confirmed against
    it: the scale under the variance bounds (scores that sum to 1 would drop every head, so ours
    have mean 1), and how many tokens each stage drops. No token is privileged: there is no class
    token.
    """

    name: ClassVar[str] = "zero-tprune"
    summary: ClassVar[str] = "UNets: drop tokens like others, then those of little attention"

    similar: float = 0.3
    iterations: int = 5
    least: float = 0.01
    most: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.similar <= 1, "similar", self.similar, "a share from 0 to 1")
        check(self.iterations >= 1, "iterations", self.iterations, "1 or more")
        check(0 <= self.least < self.most, "least", self.least, "from 0 to below `most`")

    def rank(
        self, query: Tensor, key: Tensor, scale: float | None, count: int, branches: int
    ) -> tuple[Tensor, Tensor]:
        return rank_in_stages(query, key, scale, count, branches, self.similar, self.iterations,
                              self.least, self.most, self.alike)

    def rank_key(self) -> str:
        return (f"similar {self.similar:g}, iterations {self.iterations}, "
                f"alike in {self.alike}")


@torch.library.custom_op("fastdiff::rank_in_stages", mutates_args=())
def rank_in_stages(
    query: Tensor,
    key: Tensor,
    scale: Optional[float],  # noqa: UP045 - torch 2.6 reads the schema from these names
    count: int,
    branches: int,
    similar: float,
    iterations: int,
    least: float,
    most: float,
    alike: str,
) -> tuple[Tensor, Tensor]:
    """Kept positions [B, count] and everyone's stand-in [B, S]; query, key: [B, S, H, D]."""
    tokens = query.shape[1]
    first = aligned(over_heads(page_rank(query, key, 1, scale)), branches)
    gone = min(round(similar * (tokens - count)), tokens // 2)
    left = without_alike(key, first, gone, branches)
    heads = query.shape[2:]
    q, k = (rows(x.flatten(2), left).unflatten(2, heads) for x in (query, key))
    score = over_heads(page_rank(q, k, iterations, scale), least, most)
    kept = left.gather(1, best(aligned(score, branches), count))
    return kept, stand_ins(query, key, kept, scale, alike=alike)


@rank_in_stages.register_fake
def _(query, key, scale, count, branches, similar, iterations, least, most, alike):
    shape = query.shape[:2]
    return (query.new_empty((shape[0], count), dtype=torch.int64),
            query.new_empty(shape, dtype=torch.int64))


def over_heads(score: Tensor, least: float = 0.0, most: float = float("inf")) -> Tensor:
    """Root mean square over the heads [B, H, S] -> [B, S] that vary neither too little nor much.

    The variance is that of scores of mean 1.
    """
    variance = score.var(-1, correction=0, keepdim=True)
    vote = (variance >= least) & (variance <= most)
    vote = (vote | ~vote.any(1, keepdim=True)).to(score.dtype)
    return ((score.square() * vote).sum(1) / vote.sum(1)).sqrt()


def without_alike(key: Tensor, score: Tensor, gone: int, branches: int) -> Tensor:
    """Positions left, ascending int64 [B, S - gone], when of the less important half of the tokens
    those `gone` are dropped that are most similar to one of the other half."""
    tokens = score.shape[1]
    upper, lower = parted(score, tokens - tokens // 2)
    precision = torch.promote_types(key.dtype, torch.float32)
    flat = torch.nn.functional.normalize(key.flatten(2).to(precision), dim=-1)
    a, b = rows(flat, lower), rows(flat, upper)
    step = max(1, PAIRS // max(1, b.shape[0] * b.shape[1]))
    likeness = torch.cat([(part @ b.mT).amax(-1) for part in a.split(step, dim=1)], 1)
    dropped = lower.gather(1, best(aligned(likeness, branches), gone))
    return rest_of(dropped, tokens)
