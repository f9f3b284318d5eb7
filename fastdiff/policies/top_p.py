"""TopP: every tile of queries keeps as many tiles of keys as hold a share of its attention."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.blockmask import BlockMask
from fastdiff.kernels.block_pool import block_pool
from fastdiff.layout import Tiling
from fastdiff.method import check
from fastdiff.policies.base import Context, Policy
from fastdiff.policies.cuts import best_mass, level_for_density, mass_above
from fastdiff.policies.scoring import mean_mass, proxy_mass
from fastdiff.policies.tile_sparse import forced, tile_mass

SCORES = ("probes", "mean", "proxy")
# bisection steps: tiles within 0.8 % of the last one are as good
PASSES = 16
# rows of a head that are sorted to find a share for a density
SAMPLE = 64


@dataclass(frozen=True, kw_only=True)
class TopP(Policy):
    """The fewest tiles of keys that hold the share `p` of estimated attention, for each query tile.

    What is always kept (the own tile, text, the first `sink` frames) counts first; the best others
    fill up to `p`. Flat heads and tiles thus keep more than peaked ones. The cut of every row is
    found by bisection of its value; no map is sorted.

    p: share of the estimated attention to keep; 1.0 is dense. None: one share for each sample that
        meets `density`, judged from a few rows of each head.
    score: how attention is estimated. "probes": single queries of a tile against mean keys. "mean":
        the mean query against mean keys (NABLA). "proxy": the best token pair of a mean head
        (ProxyAttn).
    probes: queries of a tile that vote, for "probes".
    proxy_heads: neighbouring heads that share one choice, for "proxy".
    proxy_stride: every so many tokens are scored, for "proxy".

    Sources: Twilight (arXiv 2502.02770) for the rule, NABLA (arXiv 2507.13546) for "mean". Cost:
    the scores, (tokens / tile)^2 entries a head, and 16 passes over them; "proxy" scores
    (tokens / proxy_stride)^2 pairs a group of heads. Limits: the share is one of estimated mass,
    and estimates are flatter than attention; NABLA's models are trained with their masks and add a
    local window.
    """

    name: ClassVar[str] = "top-p"
    summary: ClassVar[str] = "tiles that hold a share of estimated attention (Twilight, NABLA)"

    tail: bool = False
    p: float | None = None
    score: str = "probes"
    probes: int = 8
    proxy_heads: int = 4
    proxy_stride: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.p is None or 0 < self.p <= 1, "p", self.p, "a share over 0, at most 1")
        check(self.score in SCORES, "score", self.score, f"one of {', '.join(SCORES)}")
        for knob in ("probes", "proxy_heads", "proxy_stride"):
            check(getattr(self, knob) >= 1, knob, getattr(self, knob), "1 or more")

    @property
    def uneven(self) -> bool:
        return True

    def select(
        self, query: Tensor, key: Tensor, tiles: Tiling, context: Context
    ) -> BlockMask | None:
        mass = self._mass(query, key, tiles, context.key_mean)
        keep = keep_share(mass, tiles, self.p, self.density)
        return BlockMask(keep, tiles.offsets, tiles.block)

    def _mass(
        self, query: Tensor, key: Tensor, tiles: Tiling, key_mean: Tensor | None
    ) -> Tensor:
        if self.score == "proxy":
            return proxy_mass(query, key, tiles, heads=self.proxy_heads, stride=self.proxy_stride)
        if key_mean is None:
            key_mean, _ = block_pool(key, tiles.offsets, block=tiles.block)
        if self.score == "probes":
            return tile_mass(query, key_mean, tiles, self.probes)
        query_mean, _ = block_pool(query, tiles.offsets, block=tiles.block)
        return mean_mass(query_mean, key_mean, tiles)


def keep_share(mass: Tensor, tiles: Tiling, p: float | None, density: float) -> Tensor:
    """Keep map, bool like mass: what must stay, and the best tiles up to the share `p` of a row.

    mass: float32 [B, H, N, N], rows sum to 1. p: None finds a share for each sample by `density`.
    """
    if p == 1 or (p is None and density == 1):
        return torch.ones_like(mass, dtype=torch.bool)
    must = forced(tiles)
    held = mass.masked_fill(~must, 0).sum(-1, keepdim=True)
    share = p if p is not None else _share(mass, held, must, tiles, density)
    return must | best_mass(mass, ~must, (share - held).clamp_min(0), (3,), PASSES)


def _share(mass: Tensor, held: Tensor, must: Tensor, tiles: Tiling, density: float) -> Tensor:
    """The share, float32 [B, 1, 1, 1], at which a sample keeps about `density` of its pairs."""
    part = tiles.lengths / tiles.lengths.sum()
    # text rows are dense whatever the share: the others make up for them
    text = part @ tiles.dense_rows.float()
    wanted = (density - text) / (1 - text).clamp_min(1e-6)
    latent = torch.linspace(0, 1, SAMPLE, dtype=torch.float32, device=mass.device)
    first = tiles.dense_rows.to(torch.int32).argmin()
    last = tiles.blocks - 1 - tiles.dense_rows.flip(0).to(torch.int32).argmin()
    rows = (first + latent * (last - first)).round().long()
    must = must[rows]
    reach = mass_above(mass[:, :, rows], (~must).expand(*mass.shape[:2], -1, -1)) + held[:, :, rows]
    return level_for_density(reach, must, part, wanted)
