"""Attention in which every query tile gathers the box of keys that its windows touch.

The plain way for windows that no block border follows: the keys of a tile are gathered once, and a
mask inside the tile says which query sees which. Nothing as large as all pairs is ever made.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.layout import TokenLayout
from fastdiff.policies.base import Terms
from fastdiff.policies.windows import AxisTiles

# scores that are held at a time
SCORES = 1 << 26


@dataclass(frozen=True)
class Gather:
    """Query tiles of a grid: the axes' tiles, and keys that every query sees besides.

    always: int64 [A], tokens of the sequence that every query sees; lead: leading frames among
    them, which windows then leave out.
    """

    layout: TokenLayout
    axes: tuple[AxisTiles, AxisTiles, AxisTiles]
    always: Tensor
    lead: int

    @property
    def tiles(self) -> tuple[int, int, int]:
        t, h, w = (axis.query.shape[0] for axis in self.axes)
        return t, h, w

    @property
    def sides(self) -> tuple[int, int, int]:
        t, h, w = (axis.query.shape[1] for axis in self.axes)
        return t, h, w

    @property
    def keys(self) -> int:
        return math.prod(axis.key.shape[1] for axis in self.axes) + self.always.numel()


def gathered_attention(
    query: Tensor, key: Tensor, value: Tensor, gather: Gather, terms: Terms
) -> Tensor:
    """Attention of [B, S, H, D] in raster order; text queries see every key."""
    batch, _, heads, width = query.shape
    layout = gather.layout
    tiles, sides = math.prod(gather.tiles), math.prod(gather.sides)
    step = max(1, SCORES // (batch * heads * sides * gather.keys))
    parts = []
    for begin in range(0, tiles, step):
        number = torch.arange(begin, min(tiles, begin + step), device=query.device)
        rows, columns, sees = _tile(gather, number)
        q, k, v = _rows(query, rows), _rows(key, columns), _rows(value, columns)
        if terms.key_mask is not None:
            counts = terms.key_mask[:, columns.flatten()].view(batch, *columns.shape)
            sees = sees & counts[:, :, None]
        sees = sees.expand(batch, *sees.shape[-3:]).flatten(0, 1)[:, None]
        out = _attention(q, k, v, sees, terms.scale)
        parts.append(out.transpose(1, 2).reshape(batch, -1, heads, width))
    grid = torch.cat(parts, 1).index_select(1, _slots(gather))
    text = torch.cat([query[:, : layout.before], query[:, layout.before + layout.grid_tokens :]], 1)
    if text.shape[1] == 0:
        return grid
    mask = None if terms.key_mask is None else terms.key_mask[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (text, key, value))
    text = _attention(q, k, v, mask, terms.scale).transpose(1, 2)
    return torch.cat([text[:, : layout.before], grid, text[:, layout.before :]], 1)


def _tile(gather: Gather, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of these tiles: tokens of queries [n, Q] and of keys [n, K], and who sees whom [n, Q, K]."""
    frames, height, width = gather.layout.grid
    _, rows, columns = gather.tiles
    t, h, w = gather.axes
    at = (number // (rows * columns), number // columns % rows, number % columns)
    n = number.numel()

    def product(by_axis: list[Tensor]) -> Tensor:
        ts, hs, ws = by_axis
        flat = (ts[:, :, None, None] * height + hs[:, None, :, None]) * width + ws[:, None, None]
        return flat.reshape(n, -1) + gather.layout.before

    queries = product([t.query[at[0]], h.query[at[1]], w.query[at[2]]])
    keys = product([t.key[at[0]], h.key[at[1]], w.key[at[2]]])
    st, sh, sw = t.sees[at[0]], h.sees[at[1]], w.sees[at[2]]
    if gather.lead:
        st = st & (t.key[at[0]] >= gather.lead)[:, None]
    sees = (
        st[:, :, None, None, :, None, None] & sh[:, None, :, None, None, :, None]
        & sw[:, None, None, :, None, None, :]
    ).reshape(n, queries.shape[1], keys.shape[1])
    keys = torch.cat([keys, gather.always.expand(n, -1)], 1)
    return queries, keys, F.pad(sees, (0, gather.always.numel()), value=True)


def _slots(gather: Gather) -> Tensor:
    """Where each grid token stands in the tiles' results, int64 [grid tokens]."""
    (t, h, w), (_, rows, columns), (qt, qh, qw) = gather.axes, gather.tiles, gather.sides
    tile = (t.slot[:, None, None] // qt * rows + h.slot[:, None] // qh) * columns + w.slot // qw
    inner = (t.slot[:, None, None] % qt * qh + h.slot[:, None] % qh) * qw + w.slot % qw
    return (tile * (qt * qh * qw) + inner).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x: [B, S, H, D]; index: [n, K]. Returns [B * n, H, K, D]."""
    rows = x.index_select(1, index.flatten()).unflatten(1, index.shape)
    return rows.flatten(0, 1).transpose(1, 2)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is None:
        return out
    # a query that sees no key gets zeros
    return out.masked_fill(~mask.any(-1, keepdim=True), 0)
