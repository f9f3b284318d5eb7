"""TokenLayout: which tokens are the latent grid, which are text, and tiles of that grid."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

Grid = tuple[int, int, int]
T = TypeVar("T")


def remembered(most: int) -> "Callable[[Callable[..., T]], _lru_cache_wrapper[T]]":
    """`lru_cache` for what holds tensors, made the same whatever the caller has set: outside
    inference mode, which else would forbid training with them later, and on the CPU where no
    device is named."""
    def wrap(make: Callable[..., T]) -> "_lru_cache_wrapper[T]":
        @lru_cache(maxsize=most)
        @wraps(make)
        def found(*args: Any, **kwargs: Any) -> T:
            with torch.inference_mode(False), torch.device("cpu"):
                return make(*args, **kwargs)

        _remembered.append(found)
        return found

    return wrap


def forget() -> None:
    """Make everything `remembered` anew from now on."""
    for found in _remembered:
        found.cache_clear()


_remembered: "list[_lru_cache_wrapper[Any]]" = []


class TokenLayout(NamedTuple):
    """One attention sequence: `before` tokens, then the latent grid in raster order, then `after`.

    `grid` is (frames, height, width) in tokens. Tokens before and after the grid (text, reference
    images, registers) are always kept.
    """

    grid: Grid
    before: int = 0
    after: int = 0

    @property
    def grid_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.before + self.grid_tokens + self.after

    def matching(self, tokens: int) -> "TokenLayout | None":
        """This layout for a sequence of so many tokens: joint, or the grid alone; else None."""
        if tokens == self.tokens:
            return self
        return TokenLayout(self.grid) if tokens == self.grid_tokens else None


@dataclass(frozen=True)
class Tiling:
    """A reordering of a sequence into blocks of tokens that are near in space and time.

    order: int64 [S], raster position of the token at each place of the tile order.
    inverse: int64 [S], its inverse.
    offsets: int32 [N + 1], token range of each block in tile order.
    lengths: float32 [N], tokens in each block.
    always: bool [N], blocks that every query keeps (text, reference tokens, leading frames).
    dense_rows: bool [N], query blocks that keep everything (text queries).
    block: the longest block, in tokens.
    text_blocks: numbers of the blocks in `dense_rows`, known on the host.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    lengths: Tensor
    always: Tensor
    dense_rows: Tensor
    block: int
    text_blocks: tuple[int, ...] = ()

    @property
    def blocks(self) -> int:
        return self.lengths.numel()


def auto_tile(grid: Grid, tokens_per_tile: int) -> Grid:
    """A tile of about `tokens_per_tile` tokens: cubic-like for video, square-like for images.

    A power of two on each axis, then evened out so that border tiles are not much smaller.
    """
    tile = [1, 1, 1]
    limits = [1 << (axis - 1).bit_length() for axis in grid]
    while math.prod(tile) < tokens_per_tile and tile != limits:
        open_axes = [i for i in range(3) if tile[i] < limits[i]]
        # the shortest side grows first; at a tie width before height before time
        axis = min(open_axes, key=lambda i: (tile[i], -i))
        tile[axis] *= 2
    # as many tiles, of even sizes: 9 frames by 4 become 3 + 3 + 3 instead of 4 + 4 + 1
    even = [math.ceil(n / math.ceil(n / size)) for n, size in zip(grid, tile, strict=True)]
    return (even[0], even[1], even[2])


@remembered(64)
def even_blocks(layout: TokenLayout, block: int, lead: int, device: torch.device) -> Tiling:
    """Cut `layout` into blocks of `block` tokens, box-like in space-time; only the last is short.

    Text comes first, then the `lead` frames, then the rest of the grid, halved again and again
    across its longest side. Tiles of a fixed shape would leave border tiles half empty: 31 % of
    the places at 21 x 30 x 52 with tiles of 4 x 4 x 8. Blocks with text in them are kept by every
    query and keep everything.
    """
    frames, height, width = layout.grid
    lead = min(lead, frames) if frames > 1 else 0
    text = torch.cat([torch.arange(layout.before),
                      torch.arange(layout.tokens - layout.after, layout.tokens)])
    number = torch.arange(layout.grid_tokens)
    place = torch.stack((number // (height * width), number // width % height, number % width))
    # the leading frames, and what fills up the last block of text and them
    first = text.numel() + lead * height * width
    filler = min(-first % block, layout.grid_tokens - lead * height * width)
    head = lead * height * width + filler
    parts = [text, number[:head] + layout.before]
    parts += [number[leaf] + layout.before for leaf in _halved(place, number[head:], block)]
    order = torch.cat(parts)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    offsets = torch.tensor([*range(0, layout.tokens, block), layout.tokens])
    lengths = offsets.diff()
    starts = offsets[:-1]
    return Tiling(
        order=order.to(device),
        inverse=inverse.to(device),
        offsets=offsets.to(torch.int32).to(device),
        lengths=lengths.to(torch.float32).to(device),
        always=(starts < first).to(device),
        dense_rows=(starts < text.numel()).to(device),
        block=int(lengths.max()),
        text_blocks=numbers_of(starts < text.numel()),
    )


def _halved(place: Tensor, tokens: Tensor, block: int) -> list[Tensor]:
    """`tokens` cut across the longest side of their box, at whole blocks, down to single blocks."""
    blocks = math.ceil(tokens.numel() / block)
    if blocks <= 1:
        return [tokens]
    where = place[:, tokens]
    axis = int((where.amax(1) - where.amin(1)).argmax())
    ordered = tokens[torch.argsort(where[axis], stable=True)]
    cut = (blocks // 2) * block
    return _halved(place, ordered[:cut], block) + _halved(place, ordered[cut:], block)


@remembered(64)
def tiling(layout: TokenLayout, tile: Grid, lead: int, device: torch.device) -> Tiling:
    """Cut `layout` into tiles.

    lead: so many leading frames are cut into tiles of one frame and are kept by every query.
    """
    frames, height, width = layout.grid
    lead = min(lead, frames) if frames > 1 else 0
    t = torch.arange(frames).view(-1, 1, 1)
    h = torch.arange(height).view(1, -1, 1)
    w = torch.arange(width).view(1, 1, -1)
    body = _tile_ids(t - lead, h, w, tile, height, width)
    flat_tile = auto_tile((1, height, width), math.prod(tile))
    head = _tile_ids(t, h, w, flat_tile, height, width)
    head_count = lead * math.ceil(height / flat_tile[1]) * math.ceil(width / flat_tile[2])
    grid_ids = torch.where(t < lead, head, body + head_count).reshape(-1)

    block = max(math.prod(tile), math.prod(flat_tile) if lead else 1)
    before = torch.arange(layout.before) // block
    after = torch.arange(layout.after) // block
    n_before = math.ceil(layout.before / block)
    n_grid = int(grid_ids.max()) + 1
    ids = torch.cat([before, grid_ids + n_before, after + n_before + n_grid])

    order = torch.argsort(ids, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    lengths = torch.bincount(ids)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    number = torch.arange(lengths.numel())
    text = (number < n_before) | (number >= n_before + n_grid)
    return Tiling(
        order=order.to(device),
        inverse=inverse.to(device),
        offsets=offsets.to(torch.int32).to(device),
        lengths=lengths.to(torch.float32).to(device),
        always=(text | (number < n_before + head_count)).to(device),
        dense_rows=text.to(device),
        block=int(lengths.max()),
        text_blocks=numbers_of(text),
    )


def numbers_of(chosen: Tensor) -> tuple[int, ...]:
    """Where a bool vector on the CPU is True."""
    return tuple(chosen.nonzero().flatten().tolist())


def _tile_ids(t: Tensor, h: Tensor, w: Tensor, tile: Grid, height: int, width: int) -> Tensor:
    rows, columns = math.ceil(height / tile[1]), math.ceil(width / tile[2])
    return ((t // tile[0]) * rows + h // tile[1]) * columns + w // tile[2]
