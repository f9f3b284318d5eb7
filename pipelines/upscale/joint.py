"""Joint attention of text and grid, with the text's part of the windows taken from the guide.

A place of the grid looks at text and at its window in one softmax. That softmax falls into two, of
which each has an output o and a log denominator l: over the window (o_w, l_w) and over the text
(o_t, l_t), and the whole is (exp(l_w) o_w + exp(l_t) o_t) / (exp(l_w) + exp(l_t)). What is
overridden is (o_t, l_t): query, keys and values of the guide row. The window's own denominator
stays, so that text weighs as much against a window as it did in training. Text queries see all of
their own row.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdiff.kernels.block_sparse_attention import block_sparse_attention
from fastdiff.layout import TokenLayout
from fastdiff.pipelines.upscale.turn import Turn
from fastdiff.policies.inward_window import by_head_groups

# (o, l): [B, S, H, D] and float32 [B, S, H]
Part = tuple[Tensor, Tensor]
_BLOCK = 128


def split(layout: TokenLayout, x: Tensor) -> tuple[Tensor, Tensor]:
    """(grid, text) of a sequence [B, S, ...]."""
    grid = x[:, layout.before : layout.before + layout.grid_tokens]
    text = [x[:, : layout.before], x[:, layout.before + layout.grid_tokens :]]
    return grid, torch.cat(text, 1) if layout.before and layout.after else text[layout.before == 0]


def join(layout: TokenLayout, grid: Tensor, text: Tensor) -> Tensor:
    return torch.cat([text[:, : layout.before], grid, text[:, layout.before :]], 1)


def merge(window: Part, text: Part) -> Tensor:
    """One softmax out of two, [B, S, H, D]; float32 inside."""
    share = torch.sigmoid((text[1] - window[1]).float())[..., None]
    return torch.lerp(window[0].float(), text[0].float(), share).to(window[0].dtype)


def text_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Part:
    """Attention of grid queries to text alone. mask: bool [B, text], of the keys that count."""
    tokens, text = query.shape[1], key.shape[1]

    def offsets(length: int) -> Tensor:
        ends = [*range(0, length, _BLOCK), length]
        return torch.tensor(ends, dtype=torch.int32, device=query.device)

    at, of = offsets(tokens), offsets(text)
    count = of.numel() - 1
    lists = torch.arange(count, dtype=torch.int32, device=query.device)
    full = torch.tensor(count, dtype=torch.int32, device=query.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Part:
        rows = (q.shape[0], q.shape[2], at.numel() - 1)
        out, lse = block_sparse_attention(
            q, k, v, lists.expand(*rows, count), full.expand(rows), at, of, block_q=_BLOCK,
            block_k=_BLOCK, key_mask=mask, scale=scale, return_lse=True)
        return out, lse.transpose(1, 2)

    out, lse = by_head_groups(attend, query, key, value)
    return out, lse


def key_mask(mask: Tensor | None, rows: int) -> Tensor | None:
    """A key-padding mask as bool [rows, S]; ValueError for any other mask."""
    if mask is None:
        return None
    if mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        return mask[:, 0, 0].expand(rows, -1)
    raise ValueError(f"an attention mask of shape {tuple(mask.shape)} and dtype {mask.dtype} hides "
                     "more than padded text, and windows cannot follow it")


class Rows:
    """One joint attention call: query, key, value [B, S, H, D] of all rows of a turn."""

    def __init__(
        self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        mask: Tensor | None, scale: float | None, layout: TokenLayout,
    ) -> None:
        self.attend, self.layout, self.mask, self.scale = attend, layout, mask, scale
        self.query, self.key, self.value = query, key, value
        self.padding = key_mask(mask, query.shape[0])

    def text(self, rows: slice) -> Part:
        """What the grid of these rows takes from their own text."""
        query, _ = split(self.layout, self.query[rows])
        (_, key), (_, value) = (split(self.layout, x[rows]) for x in (self.key, self.value))
        mask = None if self.padding is None else split(self.layout, self.padding[rows])[1]
        return text_part(query, key, value, mask, self.scale)

    def dense(self, rows: slice) -> Tensor:
        mask = None if self.mask is None else self.mask[rows]
        return self.attend(self.query[rows], self.key[rows], self.value[rows], mask)

    def windowed(self, rows: slice, window: Callable[..., Part], text: Part) -> Tensor:
        """The window branch of these rows with `text` as its text part; whole sequences."""
        (query, words), (key, _), (value, _) = (
            split(self.layout, x[rows]) for x in (self.query, self.key, self.value))
        grid = merge(window(query, key, value, self.scale), text)
        mask = None if self.mask is None else self.mask[rows]
        said = self.attend(words, self.key[rows], self.value[rows], mask)
        return join(self.layout, grid, said)


def windowed_rows(turn: Turn, call: Rows, window: Callable[..., Part], guide: Part) -> Tensor:
    """The window branch of all rows that were asked for: unguided ones with their own text."""
    outs = []
    if turn.first:
        own = slice(0, turn.first)
        outs.append(call.windowed(own, window, call.text(own)))
    if turn.guided:
        outs.append(call.windowed(slice(turn.first, turn.rows), window, guide))
    return torch.cat(outs) if len(outs) > 1 else outs[0]
