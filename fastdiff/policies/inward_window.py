"""Inward window: each query of a grid sees all frames of one window; exact, by lists of tiles."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.kernels.token_permute import permute_tokens
from fastdiff.kernels.window_attention import chosen, window_attention
from fastdiff.layout import Grid, TokenLayout, remembered
from fastdiff.policies.base import Terms
from fastdiff.policies.gathered import Gather, gathered_attention
from fastdiff.policies.partition import axis_product, blocks_of
from fastdiff.policies.windows import Axis, cut_blocks, cut_tiles

Sides = tuple[int, int]

# numbers of a tensor that a kernel is given at once
MOST_NUMBERS = 1 << 30
# of the window's side: longer tiles would leave too many queries far off its middle
COARSE = 0.25


def trained_window(native: Sides) -> Sides:
    """The window of arXiv 2511.14712 for a trained grid of `native` (height, width) tokens.

    2 * (n // 2) + 1 on each axis: the trained side, one more where it is even.
    """
    return 2 * (native[0] // 2) + 1, 2 * (native[1] // 2) + 1


def inward_axis(size: int, window: int, slide: int = 1) -> Axis:
    """Windows of `window` keys around each place of an axis, shifted inward at its ends.

    slide: so many neighbours share a window, which then begins at a multiple of `slide`; `window`
    is rounded to a multiple as well. 1 is start = clamp(place - window // 2, 0, size - window).
    A window as long as the axis or longer is the whole axis.
    """
    place = torch.arange(size)
    if slide > 1:
        window = max(1, math.floor(window / slide + 0.5)) * slide
    if window >= size:
        return Axis(place, torch.zeros_like(place), torch.full_like(place, size))
    # an even number of parts reaches one part further back than ahead
    before = (window // slide) // 2 * slide
    low = (place // slide * slide - before).clamp(0, size - window)
    return Axis(place, low, low + window)


class WindowPlan(NamedTuple):
    """The windows of one grid, cut so that every window is a set of whole blocks.

    layout: the grid. axes: the windows of height and width. tile: (frames, height, width) tokens of
    a block, at most. single: windows move by single tokens. density: the share of pairs in windows.
    order, inverse: int64 [S], block order of the tokens and its inverse. offsets: int32 [N + 1].
    indices: int32 [N, M], counts: int32 [N]: blocks that each block sees. block: the longest.
    """

    layout: TokenLayout
    axes: tuple[Axis, Axis]
    tile: Grid
    single: bool
    density: float
    order: Tensor
    inverse: Tensor
    offsets: Tensor
    indices: Tensor
    counts: Tensor
    block: int

    @property
    def full(self) -> bool:
        """Whether every query sees everything, so that nothing but dense attention is wanted."""
        return self.density == 1.0


@remembered(32)
def window_plan(
    grid: Grid, window: Sides, slide: str, block: int, device: torch.device
) -> WindowPlan:
    """The plan of a grid. slide: "tile", "token" for windows that move by single tokens, or "auto":
    tiles, unless one is longer than a quarter of the window on an axis.

    Tiles hold all frames where that fits, as the window does. Memory is tiles times tiles in a
    window; no map of all pairs of tiles is made.
    """
    tile = choose_tile(grid, window, block)
    coarse = any(t > COARSE * min(k, n)
                 for t, k, n in zip(tile[1:], window, grid[1:], strict=True))
    single = slide == "token" or (slide == "auto" and coarse)
    steps = (1, 1) if single else tile[1:]
    height, width = (inward_axis(n, k, s)
                     for n, k, s in zip(grid[1:], window, steps, strict=True))
    time = Axis(torch.arange(grid[0]), torch.zeros(grid[0], dtype=torch.int64),
                torch.full((grid[0],), grid[0]))
    cuts = [cut_blocks(axis, most)
            for axis, most in zip((time, height, width), tile, strict=True)]
    layout = TokenLayout(grid)
    tiles = blocks_of(layout, axis_product(*(ids for ids, _ in cuts)), block, device)
    indices, counts = _lists([sees for _, sees in cuts])
    density = height.pairs * width.pairs / (height.size * width.size) ** 2
    return WindowPlan(layout, (height, width), tile, single, density, tiles.order, tiles.inverse,
                      tiles.offsets, indices.to(device), counts.to(device), tiles.block)


def choose_tile(grid: Grid, window: Sides, block: int) -> Grid:
    """(frames, height, width) of a tile of at most `block` tokens for windows of these sides.

    All frames, or an even part of them: the window holds them anyway, so a tile of few places
    moves the window least. Weighs how full blocks are against how far windows are rounded.
    """
    best, cost = (1, 1, 1), math.inf
    for parts in range(1, grid[0] + 1):
        frames = math.ceil(grid[0] / parts)
        for high in range(1, min(grid[1], block // frames) + 1):
            wide = min(grid[2], block // (frames * high))
            for broad in range(max(1, wide // 2), wide + 1):
                tile = (frames, high, broad)
                found = _tile_cost(grid, window, tile, block)
                if found < cost:
                    best, cost = tile, found
    return best


def _tile_cost(grid: Grid, window: Sides, tile: Grid, block: int) -> float:
    blocks = math.prod(math.ceil(n / t) for n, t in zip(grid, tile, strict=True))
    # queries and keys are both padded to whole blocks
    padding = 2 * math.log(blocks * block / math.prod(grid))
    rounding = 0.0
    for size, wanted, slide in zip(grid[1:], window, tile[1:], strict=True):
        wanted = min(wanted, size)
        parts = max(1, math.floor(wanted / slide + 0.5))
        rounding += abs(math.log(min(size, parts * slide) / wanted))
        # the queries of a tile share a window, whose middle is off theirs by so much at most
        rounding += (slide - 1 if parts % 2 else 2 * slide - 1) / wanted
    return padding + 2 * rounding


def _lists(sees: list[Tensor]) -> tuple[Tensor, Tensor]:
    """indices [N, M] and counts [N] of blocks, from which block of each axis sees which."""
    axes = [_axis_lists(keep) for keep in sees]
    (t, nt), (h, nh), (w, nw) = axes
    rows, columns = len(h), len(w)
    at = torch.arange(len(t) * rows * columns)
    it, ih, iw = at // (rows * columns), at // columns % rows, at % columns
    number = (t[it][:, :, None, None] * rows + h[ih][:, None, :, None]) * columns
    number = (number + w[iw][:, None, None]).flatten(1)
    valid = ((torch.arange(t.shape[1]) < nt[it, None])[:, :, None, None]
             & (torch.arange(h.shape[1]) < nh[ih, None])[:, None, :, None]
             & (torch.arange(w.shape[1]) < nw[iw, None])[:, None, None]).flatten(1)
    place = torch.argsort(~valid, dim=1, stable=True)
    return number.gather(1, place).to(torch.int32), valid.sum(1, dtype=torch.int32)


def _axis_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    counts = keep.sum(1)
    return torch.argsort(~keep, dim=1, stable=True)[:, : int(counts.max())], counts


def tiled_window(
    query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside windows by whole blocks. query, key, value: [B, S, H, D] in raster order.

    Returns [B, S, H, D] and the natural log of the softmax denominator, float32 [B, S, H].
    """
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        batch, _, heads, _ = q.shape
        q, k, v = (permute_tokens(x, plan.order) for x in (q, k, v))
        out, lse = block_sparse_attention(
            q, k, v, plan.indices.expand(batch, heads, -1, -1),
            plan.counts.expand(batch, heads, -1), plan.offsets, plan.offsets, block_q=plan.block,
            block_k=plan.block, scale=scale, return_lse=True)
        return (permute_tokens(out, plan.inverse),
                permute_tokens(lse.transpose(1, 2).contiguous(), plan.inverse))

    out, lse = by_head_groups(attend, query, key, value)
    return out, lse


def by_head_groups(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]], *qkv: Tensor
) -> tuple[Tensor, ...]:
    """`attend` in groups of heads that a kernel's 32-bit places can number, [B, S, H, ...] of all.
    """
    groups = math.ceil(qkv[0].numel() / MOST_NUMBERS)
    if groups <= 1:
        return attend(*qkv)
    size = math.ceil(qkv[0].shape[2] / groups)
    parts = [attend(*(x.contiguous() for x in group))
             for group in zip(*(x.split(size, dim=2) for x in qkv), strict=True)]
    return tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))


def exact_window(
    query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, scale: float | None = None,
    tell: Callable[[str], None] = lambda reason: None,
) -> Tensor:
    """The same for windows that move by single tokens, without a block for each of them.

    On a GPU by the windows' own kernel, elsewhere by `gathered_window`; of the same result.
    tell: told why the kernel cannot run, where it cannot.
    """
    try:
        impl = chosen(query, key, value)
    except ValueError as refusal:
        tell(str(refusal))
        return gathered_window(query, key, value, plan, scale)
    height, width = (int(axis.high[0] - axis.low[0]) for axis in plan.axes)
    grid = plan.layout.grid

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (window_attention(q, k, v, grid=grid, window=(grid[0], height, width), scale=scale,
                                 impl=impl),)

    return by_head_groups(attend, query, key, value)[0]


def gathered_window(
    query: Tensor, key: Tensor, value: Tensor, plan: WindowPlan, scale: float | None = None,
) -> Tensor:
    """The same in plain torch: the keys of a tile are gathered, and masked inside it."""
    with torch.device("cpu"):
        frames = torch.arange(plan.layout.grid[0])
        time = Axis(frames, torch.zeros_like(frames), torch.full_like(frames, len(frames)))
        axes = [cut_tiles(axis, most).to(query.device)
                for axis, most in zip((time, *plan.axes), plan.tile, strict=True)]
    none = torch.empty(0, dtype=torch.int64, device=query.device)
    gather = Gather(plan.layout, (axes[0], axes[1], axes[2]), none, 0)
    return gathered_attention(query, key, value, gather, Terms(scale=scale))
