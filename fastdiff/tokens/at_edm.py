"""AtEdm: keep the tokens that receive attention (AT-EDM)."""

from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
from torch import Tensor

from fastdiff.method import check
from fastdiff.tokens.prune import Pruner
from fastdiff.tokens.rank import aligned, page_rank, parted, stand_ins


@dataclass(frozen=True, kw_only=True)
class AtEdm(Pruner):
    """Token pruning by a page rank of the first self-attention of a block.

    A token's score is the attention that it receives, weighed by the score of who gives it, and
    the mean over the heads. No attention map is held: the scores come from queries, keys and
    softmax denominators (`kernels/column_mass`).

    iterations: applications of the page rank. One is the mean attention received; on sharp maps
        its best tokens differ from those of the fixed point.

    Cost: (1 + iterations) products of queries and keys for a block, half an attention forward
    each, and one of dropped queries with kept keys. Source: AT-EDM (arXiv 2405.05252). From the
    paper: where the ranking and the pruning stand, the dagger layout, recovery by similarity, a
    schedule that prunes less in early steps. Not confirmed against it: how heads are put together,
    how many early steps (`early_steps`), and that similarity is read along the rows. Ours: ranking
    without the map, stand-ins by similar keys (`alike="attention"` is the paper's), aligned
    branches, blocks of a single layer, `recover="increment"`.
    """

    name: ClassVar[str] = "at-edm"
    summary: ClassVar[str] = "UNets: drop tokens that receive little attention, fill in by likeness"

    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.iterations >= 1, "iterations", self.iterations, "1 or more")

    def rank(
        self, query: Tensor, key: Tensor, scale: float | None, count: int, branches: int
    ) -> tuple[Tensor, Tensor]:
        return rank_by_attention(query, key, scale, count, branches, self.iterations, self.alike)

    def rank_key(self) -> str:
        return f"iterations {self.iterations}, alike in {self.alike}"


@torch.library.custom_op("fastdiff::rank_by_attention", mutates_args=())
def rank_by_attention(
    query: Tensor,
    key: Tensor,
    scale: Optional[float],  # noqa: UP045 - torch 2.6 reads the schema from these names
    count: int,
    branches: int,
    iterations: int,
    alike: str,
) -> tuple[Tensor, Tensor]:
    """Kept positions [B, count] and everyone's stand-in [B, S]; query, key: [B, S, H, D]."""
    score = aligned(page_rank(query, key, iterations, scale).mean(1), branches)
    kept, dropped = parted(score, count)
    return kept, stand_ins(query, key, kept, scale, dropped, alike)


@rank_by_attention.register_fake
def _(query, key, scale, count, branches, iterations, alike):
    shape = query.shape[:2]
    return (query.new_empty((shape[0], count), dtype=torch.int64),
            query.new_empty(shape, dtype=torch.int64))
