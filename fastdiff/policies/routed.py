"""Attention in which every query takes whole chunks of keys of its own choice, exactly.

The queries that chose a chunk are gathered behind each other, chunk by chunk, and run on the
block-sparse kernel against that chunk alone; the parts of a query are then merged by their
log-sum-exp. Only kept pairs are computed. The order of all sums is fixed, so runs can be repeated.
"""

from typing import cast

import torch
from torch import Tensor

from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.policies.base import Terms
from fastdiff.policies.chunks import Chunks

# queries of a gathered block, and numbers gathered at a time (queries x head dim)
BLOCK = 64
GATHERED = 1 << 26


def routed_attention(
    query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, route: Tensor, terms: Terms,
    others: int | None = None,
) -> Tensor:
    """Attention to the own chunk, to text, and to the chunks in `route`; [B, S, H, D].

    query, key, value, terms.key_mask: in tile order. route: bool [B, H, S_grid, C], without the own
    chunk. others: how many chunks every query chose; None reads the largest number from the device.
    """
    out, lse = _own_part(query, key, value, chunks, terms)
    if route.shape[-1] < 2 or others == 0:
        return out
    batch, heads, tokens, _ = route.shape
    if others is None:
        pairs = route.sum((2, 3)).amax()
        most, capacity = torch.stack([route.sum(-1).amax(), pairs]).tolist()
    else:
        most, capacity = others, tokens * others
    if most == 0:
        return out
    groups = heads // key.shape[2]
    step = GATHERED // max(1, batch * capacity * query.shape[-1])
    step = max(1, step // groups) * groups
    parts = []
    for begin in range(0, heads, step):
        part = slice(begin, begin + step)
        kv = slice(begin // groups, (begin + step) // groups)
        parts.append(_add_routes(
            out[:, chunks.grid, part], lse[:, part, chunks.grid], query[:, chunks.grid, part],
            key[:, :, kv], value[:, :, kv], chunks, route[:, part], terms, most, capacity,
        ))
    grid = chunks.grid
    return torch.cat([out[:, : grid.start], torch.cat(parts, 2), out[:, grid.stop :]], 1)


def _own_part(
    query: Tensor, key: Tensor, value: Tensor, chunks: Chunks, terms: Terms
) -> tuple[Tensor, Tensor]:
    tiles = chunks.tiles
    own = chunks.own.expand(query.shape[0], query.shape[2], tiles)
    found = block_sparse_attention(
        query, key, value, *own.lists(), tiles.offsets, tiles.offsets, block_q=tiles.block,
        block_k=tiles.block, key_mask=terms.key_mask, scale=terms.scale, return_lse=True,
        impl=terms.impl,
    )
    return cast(tuple[Tensor, Tensor], found)


def _add_routes(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, chunks: Chunks,
    route: Tensor, terms: Terms, most: int, capacity: int,
) -> Tensor:
    """`out` [B, S_grid, H, D] with the routed chunks merged in."""
    batch, heads, tokens, count = route.shape
    place, source, chunk_of = _places(route, capacity)
    gathered = _take(query, source)
    held = chunk_of.clamp_max(count - 1)
    indices = chunks.first[held][..., None] + torch.arange(
        chunks.longest, dtype=torch.int32, device=route.device)
    counts = torch.where(chunk_of < count, chunks.count[held], 0)
    offsets = torch.arange(
        0, source.shape[-1] + 1, BLOCK, dtype=torch.int32, device=route.device)
    part, part_lse = cast(tuple[Tensor, Tensor], block_sparse_attention(
        gathered, key, value, indices.int(), counts.int(), offsets, chunks.tiles.offsets,
        block_q=BLOCK, block_k=chunks.tiles.block, key_mask=terms.key_mask, scale=terms.scale,
        return_lse=True, impl=terms.impl,
    ))
    # [B, H, S, most]: where the parts of each query stand
    # in the order of the chunks, so that sums can be repeated
    rank = torch.arange(count, 0, -1, dtype=torch.int32, device=route.device)
    valid, chosen = (route * rank).topk(most, dim=-1)
    spot = place.gather(-1, chosen)
    many = part_lse.gather(-1, spot.flatten(2)).view_as(spot)
    many = many.masked_fill(valid == 0, -torch.inf)
    total = torch.cat([lse[..., None], many], -1).logsumexp(-1)
    # a query with no key at all keeps its zeros
    total = total.masked_fill(total == -torch.inf, 0)
    merged = out.to(total.dtype) * _weight(lse - total)
    for i in range(most):
        merged = merged + _take(part, spot[..., i]).to(total.dtype) * _weight(many[..., i] - total)
    return merged.to(out.dtype)


def _places(route: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the gathered copies of queries stand; chunk by chunk, each from a block's start.

    Returns place, int64 [B, H, S, C], of a query's copy for a chunk (any where it has none);
    source, int64 [B, H, P], the query at each place; chunk_of, int64 [B, H, P / BLOCK], C where
    unused.
    """
    batch, heads, tokens, count = route.shape
    blocks = -(-capacity // BLOCK) + count
    rank = route.mT.to(torch.int32).cumsum(-1, dtype=torch.int32)
    needed = (rank[..., -1] + BLOCK - 1) // BLOCK
    end = needed.cumsum(-1)
    place = ((end - needed) * BLOCK)[..., None] + rank.long() - 1
    # what is not routed writes to one more slot, which is dropped
    spare = blocks * BLOCK
    slot = torch.where(route.mT, place, spare).flatten(2)
    token = torch.arange(tokens, device=route.device).expand(batch, heads, count, tokens)
    source = torch.zeros(batch, heads, spare + 1, dtype=torch.int64, device=route.device)
    source.scatter_(-1, slot, token.flatten(2))
    number = torch.arange(blocks, device=route.device).expand(batch, heads, blocks)
    chunk_of = torch.searchsorted(end, number.contiguous(), right=True)
    return place.mT.clamp(0, spare - 1), source[..., :spare], chunk_of


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x: [B, S, H, D]; index: int64 [B, H, P]. Returns [B, P, H, D]."""
    return x.gather(1, index.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1]))


def _weight(log: Tensor) -> Tensor:
    """[B, H, S] -> [B, S, H, 1]."""
    return log.exp().transpose(1, 2)[..., None]
