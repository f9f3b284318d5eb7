"""TileSparse: our default; keeps the tiles whose pooled score stands out, pools the rest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask, ListedMask
from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.tile_select import tile_select
from fastdiff.layout import Tiling
from fastdiff.policies.base import Context, Policy, _check

SELECT = ("top-k", "threshold", "top-p")


@dataclass(frozen=True, kw_only=True)
class TileSparse(Policy):
    """Block-sparse attention over 3-D tiles with a pooled tail.

    A few queries of each tile (`probes`) look at the mean key of every tile; the mean of their
    softmax says how much attention mass each tile of keys holds for the tile of queries. Kept are
    the tiles that stand out, and always: the own tile, text and reference tokens, the first `sink`
    frames. Tiles that are not kept enter the same softmax through their mean key and mean value
    with the weight of their length (`tail`), so no attention mass is dropped.

    select_by: "top-k" keeps the best tiles of each row, as many in all; "threshold" keeps tiles
        whose log mass exceeds mean + beta * std of its row; "top-p" keeps the best tiles until they
        hold the share `p` of the pooled softmax.
    beta: cut of "threshold" fixed by hand. None finds, for every sample and layer, the cut that
        meets `density` on average; rows and heads that need more tiles then get more.
    p: cut of "top-p" fixed by hand; None likewise.
    probes: queries of a tile that vote. More find more of what a tile needs and cost more.

    Cost: one product of probes with mean keys, (tokens / tile)^2 * probes entries a head, in chunks
    of at most 32 M entries. Limits: keys are judged by tile means, so a single outstanding key
    inside a dull tile is missed; at a few hundred tokens there are too few tiles to choose from.
    Sources: threshold and tail as in Sol-Attn (arXiv 2607.24027) and PISA (arXiv 2602.01077);
    voting by single queries is ours (a mean over the queries of a tile cancels rotated positions).
    """

    name: ClassVar[str] = "tile-sparse"
    summary: ClassVar[str] = "3-D tiles by pooled score, skipped tiles pooled (default)"

    select_by: str = "top-k"
    probes: int = 8
    beta: float | None = None
    p: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.select_by in SELECT, "select_by", self.select_by, f"one of {', '.join(SELECT)}")
        _check(self.probes >= 1, "probes", self.probes, "1 or more")
        _check(self.p is None or 0 < self.p <= 1, "p", self.p, "a share over 0, at most 1")

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        key_mean = context.key_mean
        if key_mean is None:
            key_mean, _ = block_pool(key, tiles.offsets, block=tiles.block)
        density = self._budget(context, query.device)
        if self._counted and isinstance(density, float):
            found = tile_select(query, key_mean, tiles.offsets, tiles.always, tiles.dense_rows,
                                density=density, probes=self.probes,
                                each_row=self.select_by == "top-k")
            pairs = query.shape[0] * query.shape[2] * query.shape[1] ** 2
            return ListedMask(found.keep, tiles.offsets, tiles.block, found.indices, found.counts,
                              found.pairs / pairs)
        mass = tile_mass(query, key_mean, tiles, self.probes)
        # per key, so that a short border tile is not judged by its size
        scores = (mass / tiles.lengths).clamp_min(1e-20).log()
        keep = keep_tiles(scores, tiles, self.select_by, density, self.beta, self.p)
        return BlockMask(keep, tiles.offsets, tiles.block)

    @property
    def uneven(self) -> bool:
        return self.select_by != "top-k" or self.calibration is not None

    @property
    def _counted(self) -> bool:
        """Whether a histogram finds the cut."""
        return self.select_by == "top-k" or self.select_by == "threshold" and self.beta is None

    def _budget(self, context: Context, device: torch.device) -> float | Tensor:
        """A plan's density for each head, else one that the heads share as they need."""
        found = self.calibration
        if found is None or found.density is None or context.layer >= len(found.layers):
            return self.density
        heads = found.heads(context.layer, context.clock)
        if isinstance(heads, (list, tuple)):
            return torch.tensor(heads, dtype=torch.float32, device=device)
        return self.density


def tile_mass(query: Tensor, key_mean: Tensor, tiles: Tiling, probes: int) -> Tensor:
    """Share of attention that each query tile gives to each key tile, float32 [B, H, N, N].

    query: [B, S, H, D] in tile order; key_mean: [B, Hk, N, D]. Estimated by `probes` evenly spaced
    queries of each tile against mean keys.
    """
    heads, blocks = query.shape[2], tiles.blocks
    full = {"dtype": torch.float32, "device": query.device}
    place = torch.linspace(0, 1, probes, **full) if probes > 1 else 0.5
    pick = tiles.offsets[:-1, None] + ((tiles.lengths[:, None] - 1) * place).round()
    q = query.index_select(1, pick.flatten().long()).transpose(1, 2).float()
    k = key_mean.float()
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    q, weight = q * query.shape[-1] ** -0.5, tiles.lengths.log()
    step = max(1, (1 << 25) // max(1, blocks * blocks * probes))
    parts = []
    for begin in range(0, heads, step):
        part = slice(begin, begin + step)
        scores = q[:, part] @ k[:, part].transpose(-1, -2) + weight
        parts.append(scores.softmax(-1).unflatten(2, (blocks, probes)).mean(3))
    return torch.cat(parts, dim=1)


def forced(tiles: Tiling) -> Tensor:
    """bool [N, N]: own tile, always-kept keys, and every key for text queries."""
    own = torch.eye(tiles.blocks, dtype=torch.bool, device=tiles.always.device)
    return own | tiles.always[None, :] | tiles.dense_rows[:, None]


def keep_tiles(
    scores: Tensor, tiles: Tiling, select_by: str, density: float | Tensor,
    beta: float | None, p: float | None,
) -> Tensor:
    """Turn pooled scores [B, H, N, N] into a keep map, bool of the same shape.

    density: one that the heads share, or float32 [H].
    """
    each = isinstance(density, Tensor)
    if not each and density == 1 and beta is None and p is None:
        return torch.ones_like(scores, dtype=torch.bool)
    must = forced(tiles)
    candidate = ~tiles.always
    if select_by == "top-k":
        return _top_k(scores, must, density)
    if select_by == "top-p":
        # share of the pooled softmax held by better tiles: the best tile of a row has 0
        rank, cut, given = _mass_above(scores + tiles.lengths.log(), candidate), "below", p
    else:
        rank, cut, given = _row_z(scores, candidate, tiles.lengths), "above", beta
    if given is None:
        low, high = (0.0, 1.0) if cut == "below" else (-8.0, 8.0)
        given = _cut_for_density(rank, must, tiles.lengths, density, low, high, cut)
    keep = must | (rank < given if cut == "below" else rank > given)
    return keep | (density >= 1).view(-1, 1, 1) if each else keep


def _row_z(scores: Tensor, candidate: Tensor, lengths: Tensor) -> Tensor:
    weight = candidate * lengths
    weight = weight / weight.sum().clamp_min(1)
    mean = (scores * weight).sum(-1, keepdim=True)
    centred = scores - mean
    std = (centred.square() * weight).sum(-1, keepdim=True).sqrt()
    return centred / std.clamp_min(1e-6)


def _mass_above(scores: Tensor, candidate: Tensor) -> Tensor:
    mass = scores.masked_fill(~candidate, -torch.inf).softmax(-1)
    ordered, index = mass.sort(-1, descending=True)
    above = ordered.cumsum(-1) - ordered
    return torch.empty_like(mass).scatter_(-1, index, above)


def _top_k(scores: Tensor, must: Tensor, density: float | Tensor) -> Tensor:
    if isinstance(density, Tensor):
        count = (density * scores.shape[-1]).round().clamp_min(1).view(-1, 1, 1)
        order = scores.masked_fill(must, torch.inf).argsort(-1, descending=True)
        return (order.argsort(-1) < count) | must
    count = max(1, round(density * scores.shape[-1]))
    index = scores.masked_fill(must, torch.inf).topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True) | must


def _cut_for_density(
    rank: Tensor, must: Tensor, lengths: Tensor, density: float | Tensor,
    low: float, high: float, cut: str,
) -> Tensor:
    """The cut, [B, 1 or H, 1, 1], at which a sample keeps `density` of its pairs; by bisection."""
    share = lengths / lengths.sum()
    each = isinstance(density, Tensor)
    shape = (rank.shape[0], rank.shape[1] if each else 1, 1, 1)
    density = density.view(-1, 1, 1) if isinstance(density, Tensor) else density
    lo = rank.new_full(shape, low)
    hi = rank.new_full(shape, high)
    for _ in range(14):
        middle = (lo + hi) / 2
        keep = must | (rank < middle if cut == "below" else rank > middle)
        dense = (keep.float() @ share) @ share
        dense = (dense if each else dense.mean(-1)).view(shape)
        # "above": a higher cut keeps less; "below": a higher cut keeps more
        raise_low = dense > density if cut == "above" else dense < density
        lo = torch.where(raise_low, middle, lo)
        hi = torch.where(raise_low, hi, middle)
    return hi if cut == "above" else lo
