"""For every tile of queries, the tiles of keys worth exact attention: scores, cut and lists."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

__all__ = ["Selected", "tile_select"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl"}
AUTO = ("triton", "torch")
BINS = 1024


class Selected(NamedTuple):
    """keep: bool [B, H, N, N]. indices: int32 [B, H, N, N], kept tiles first, in order; what lies
    beyond the count is not to be read. counts: int32 [B, H, N]. pairs: int64 [], kept query-key
    pairs over all heads and samples."""

    keep: Tensor
    indices: Tensor
    counts: Tensor
    pairs: Tensor


def tile_select(
    query: Tensor, key_mean: Tensor, offsets: Tensor, always: Tensor, dense_rows: Tensor, *,
    density: float, probes: int = 8, each_row: bool = False, impl: str = "auto",
) -> Selected:
    """Keep the tiles of keys that stand out, as many as `density` allows a sample or a row.

    query: [B, S, H, D] in tile order. key_mean: [B, Hk, N, D], mean key of each tile. offsets:
    int32 [N + 1], from 0 to S; no tile is empty, and that is trusted. always: bool [N], tiles that
    every query keeps. dense_rows: bool [N], tiles of queries that keep everything. The own tile is
    always kept.
    density: share of the tile pairs to keep, over all heads of a sample; with `each_row` of every
    tile of queries. probes: queries of a tile that vote.

    The meaning: `probes` evenly spaced queries of each tile attend to the mean keys, each mean
    counted as many times as its tile has tokens. x(i, n) is the log of the mean of their
    softmax, a token; z its distance from the row's mean over the tiles not in `always`, in
    standard deviations. Kept are the pairs with the highest z: all of the highest of 1,024 equal
    steps of z in (-8, 8) that fit `density` whole. With `each_row` a row keeps `density` of its
    tiles, rounded to whole ones: the step that does not fit whole gives its first tiles.
    """
    B, S, H, D = query.shape
    N = offsets.numel() - 1
    if key_mean.ndim != 4 or key_mean.shape[0] != B or key_mean.shape[2:] != (N, D) or \
            H % key_mean.shape[1]:
        raise ValueError(f"key_mean must be [{B}, Hk, {N}, {D}] with Hk dividing {H}, "
                         f"got {tuple(key_mean.shape)}")
    for name, x in (("always", always), ("dense_rows", dense_rows)):
        if x.shape != (N,) or x.dtype != torch.bool:
            raise ValueError(f"{name} must be bool [{N}], got {x.dtype} {tuple(x.shape)}")
    if not 0 < density <= 1 or probes < 1:
        raise ValueError(f"density must be over 0, at most 1, and probes 1 or more, "
                         f"got {density} and {probes}")
    module = _module(choose(
        impl, query.device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(query, key_mean, probes),
        f"tile_select on {query.device}, {query.dtype}, {N} tiles"))
    return Selected(*module.run(query, key_mean, offsets, always, dense_rows,
                                density=density, probes=probes, each_row=each_row))


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)
