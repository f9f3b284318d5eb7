"""Cut a sequence into blocks by a number for each grid token; shares of density in it."""

import torch
from torch import Tensor

from fastdiff.layout import Tiling, TokenLayout, numbers_of


def blocks_of(
    layout: TokenLayout, ids: Tensor, text_block: int, device: torch.device,
    always: Tensor | None = None,
) -> Tiling:
    """The tiling whose blocks hold the grid tokens of equal id, in rising order of id.

    ids: int64 [grid tokens] on the CPU, in raster order; gaps are closed. Inside a block the raster
    order stays. Text before and after the grid is cut into blocks of at most `text_block` tokens.
    always: bool [grid tokens], tokens that every query keeps; the same for all tokens of a block.
    """
    _, ids = torch.unique(ids, return_inverse=True)
    n_grid = int(ids.max()) + 1
    n_before = -(-layout.before // text_block)
    before = torch.arange(layout.before) // text_block
    after = torch.arange(layout.after) // text_block
    whole = torch.cat([before, ids + n_before, after + n_before + n_grid])
    order = torch.argsort(whole, dim=0, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    lengths = torch.bincount(whole)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    number = torch.arange(lengths.numel())
    text = (number < n_before) | (number >= n_before + n_grid)
    kept = text.clone()
    if always is not None:
        kept[ids[always] + n_before] = True
    return Tiling(
        order=order.to(device),
        inverse=inverse.to(device),
        offsets=offsets.to(torch.int32).to(device),
        lengths=lengths.to(torch.float32).to(device),
        always=kept.to(device),
        dense_rows=text.to(device),
        block=int(lengths.max()),
        text_blocks=numbers_of(text),
    )


def block_size(layout: TokenLayout, query: Tensor) -> int:
    """Tokens of a block that suit the kernel: 64, or 128 on a GPU for long sequences."""
    return 128 if query.is_cuda and layout.tokens >= 8192 else 64


def axis_product(frames: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """One number for each grid token, [T * H * W] in raster order, from a number per axis."""
    rows, columns = int(height.max()) + 1, int(width.max()) + 1
    ids = (frames[:, None, None] * rows + height[:, None]) * columns + width
    return ids.reshape(-1)


def grid_density(layout: TokenLayout, density: float) -> float:
    """The share of grid-to-grid pairs that gives `density` over all pairs, text being dense."""
    text_free = (layout.grid_tokens / layout.tokens) ** 2
    return max(0.0, 1 - (1 - density) / text_free)


def whole_density(layout: TokenLayout, share: float) -> float:
    """The inverse of `grid_density`: over all pairs, from a share of grid-to-grid pairs."""
    return 1 - (1 - share) * (layout.grid_tokens / layout.tokens) ** 2
