"""Estimates of the attention mass between tiles, beside the probes of tile-sparse."""

import math

import torch
from torch import Tensor

from fastdiff.layout import Tiling

# scores held at a time
SCORES = 1 << 25


def mean_mass(query_mean: Tensor, key_mean: Tensor, tiles: Tiling) -> Tensor:
    """Share of each key tile in the attention of the mean query of a tile, float32 [B, H, N, N].

    query_mean: [B, H, N, D]; key_mean: [B, Hk, N, D]. As in NABLA (Kandinsky 5).
    """
    key = key_mean.float().repeat_interleave(query_mean.shape[1] // key_mean.shape[1], dim=1)
    scores = query_mean.float() @ key.mT * query_mean.shape[-1] ** -0.5
    return (scores + tiles.lengths.log()).softmax(-1)


def proxy_mass(
    query: Tensor, key: Tensor, tiles: Tiling, *, heads: int = 4, stride: int = 4
) -> Tensor:
    """Share of each key tile by the best single pair of a mean head, float32 [B, H, N, N].

    query, key: [B, S, H, D] and [B, S, Hk, D] in tile order. The mean query and key of `heads`
    neighbouring heads stand for them all; of these every `stride`-th token is scored, and a tile
    pair counts by its best pair of tokens. As in ProxyAttn (ICLR 2026), without its budget for
    each head. A rotation by position is the same for all heads, so means of rotated heads are fine.
    """
    count = query.shape[2]
    heads = math.gcd(heads, count)
    per_tile = max(1, math.ceil(tiles.block / stride))
    place = torch.arange(per_tile, device=query.device) * stride
    # a short tile repeats its last place, which changes no maximum
    last = (tiles.lengths.long() - 1) // stride * stride
    token = (tiles.offsets[:-1, None] + place.minimum(last[:, None])).flatten()
    q = query.index_select(1, token).float().unflatten(2, (-1, heads)).mean(3).transpose(1, 2)
    k = key.index_select(1, token).float().repeat_interleave(count // key.shape[2], dim=2)
    k = k.unflatten(2, (-1, heads)).mean(3).transpose(1, 2)
    rows = max(1, SCORES // (query.shape[0] * q.shape[1] * per_tile * token.numel()))
    best = []
    for begin in range(0, tiles.blocks, rows):
        part = q[:, :, begin * per_tile : (begin + rows) * per_tile]
        scores = part @ k.mT * query.shape[-1] ** -0.5
        scores = scores.unflatten(3, (-1, per_tile)).unflatten(2, (-1, per_tile))
        best.append(scores.amax((3, 5)))
    mass = (torch.cat(best, 2) + tiles.lengths.log()).softmax(-1)
    return mass.repeat_interleave(heads, dim=1)
