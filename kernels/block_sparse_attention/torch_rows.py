"""Rows of similar length, and the granules of keys that each of them sees; for torch products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# scores held at a time: 2 MiB of float32 stays in a core's cache (a single row may exceed it)
SCORES = 1 << 19


@dataclass
class Batch:
    """Rows computed together; `wanted` holds the granules of one row after the other."""

    rows: Tensor
    height: int
    columns: int
    wanted: Tensor
    # everything left of `clean` is a real key in every row; `bias` [rows, columns - clean] if any
    clean: int
    bias: Tensor | None
    # bool [rows]: no key at all. Such rows get scores of zero, and their results are dropped
    empty: Tensor | None

    def mask(self, scores: Tensor) -> Tensor:
        """Hide, in place, the columns of scores [rows, height, columns] that are no key."""
        if self.bias is not None:
            scores[:, :, self.clean :].add_(self.bias[:, None])
        return scores if self.empty is None else scores.masked_fill_(self.empty[:, None, None], 0)


class Rows:
    """The work of one call, cut into rows (batch, head, query block) and granules of keys.

    Keys move in granules, the longest runs of tokens that no block border cuts. One table holds the
    granules of every head: its tokens, its pooled keys, then one of zeros. Rows are sorted, head by
    head, by their number of granules, so few columns are ever masked. Counts and offsets are read
    on the host.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        indices: Tensor,
        counts: Tensor,
        query_offsets: Tensor,
        key_offsets: Tensor,
        *,
        block_q: int,
        key_mask: Tensor | None,
        tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    ) -> None:
        B, Sq, H, _ = query.shape
        Skv, Hk = key.shape[1:3]
        NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
        device = query.device
        self.precision = torch.promote_types(query.dtype, torch.float32)
        self.count, self.blocks, self.block_q = B * H * NQ, NQ, block_q
        self.slots = None if NQ * block_q == Sq else slots(query_offsets, block_q)

        # first granule and number of granules of every key block, [B, NK]
        if key_mask is not None and bool(key_mask.all()):
            key_mask = None
        self.front = None
        if key_mask is None:
            self.granule = math.gcd(*key_offsets.tolist()) or 1
            ends = (key_offsets // self.granule).long().expand(B, -1)
        else:
            # valid tokens move to the front, in order, and a block owns what is left of it
            self.granule = 1
            valid_before = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))
            ends = valid_before[:, key_offsets.long()]
            front = key_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
            self.front = (torch.arange(B, device=device)[:, None], front)
        block_first, block_length = ends[:, :-1], ends.diff()

        self.tokens, self.pooled, self.tail_bias = Skv // self.granule, 0, None
        if tail is not None:
            self.pooled = -(-NK // self.granule)
            spare = self.pooled * self.granule - NK
            weight, keep = tail[2:]
            bias = weight.to(self.precision).log()[:, None, None].masked_fill(keep, -torch.inf)
            bias = torch.nn.functional.pad(bias, (0, spare), value=-torch.inf)
            self.tail_bias = bias.flatten(0, 2)
        self.zero = self.tokens + self.pooled

        row = torch.arange(self.count, device=device)
        batch, head = row // (H * NQ), row // NQ % H
        self.base = (batch * Hk + head // (H // Hk)) * (self.zero + 1)
        listed = torch.arange(indices.shape[-1], device=device) < counts.reshape(-1, 1)
        lists = indices.reshape(self.count, indices.shape[-1]).long().masked_fill(~listed, 0)
        self.lengths = block_length[batch[:, None], lists].masked_fill_(~listed, 0)
        self.firsts = block_first[batch[:, None], lists]
        totals = self.lengths.sum(1)
        # head by head, whose keys then stay in cache; in it by query length (in 16s), then by keys
        heights = (query_offsets.diff().long() + 15) // 16 * 16
        heights = heights.clamp(max=block_q).repeat(B * H)
        order = (((batch * H + head) * (block_q + 1) + heights) * (Skv + 1) + totals).argsort()
        self.order = order
        self.shapes = torch.stack((heights, totals, counts.reshape(-1)), 1)[order].tolist()

    def of_queries(self, x: Tensor) -> Tensor:
        """[B, Sq, H, D] -> [rows, block_q, D], a fresh copy; slots without a token are zero."""
        return blocked(x, self.slots, self.blocks, self.block_q, self.precision).flatten(0, 2)

    def to_queries(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse, as a view or copy [B, H, Sq, D]; shape: [B, Sq, H, D]."""
        B, _, H, D = shape
        return unblocked(rows.view(B, H, self.blocks, self.block_q, D), self.slots)

    def table(self, x: Tensor, mean: Tensor | None) -> Tensor:
        """Keys or values [B, Skv, Hk, D] and their means as [B * Hk * (granules + 1), granule * D];
        each head's last granule is zero."""
        if self.front is not None:
            x = x[self.front]
        B, Skv, Hk, D = x.shape
        shape = (B, Hk, (self.zero + 1) * self.granule, D)
        table = torch.empty(shape, dtype=self.precision, device=x.device)
        table[:, :, :Skv] = x.transpose(1, 2)
        table[:, :, Skv:] = 0
        if mean is not None:
            table[:, :, Skv : Skv + mean.shape[2]] = mean
        return table.view(-1, self.granule * D)

    def from_table(self, table: Tensor, like: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """The inverse of `table`: [B, Skv, Hk, D] and, of `blocks` means, [B, Hk, blocks, D]."""
        B, Skv, Hk, D = like.shape
        table = table.view(B, Hk, (self.zero + 1) * self.granule, D)
        x = table[:, :, :Skv].transpose(1, 2)
        if self.front is not None:
            x = torch.empty_like(x).index_put_(self.front, x)
        return x, table[:, :, Skv : Skv + blocks]

    def batches(self) -> Iterator[Batch]:
        """The work in order; rows without keys or queries never appear."""
        device = self.order.device
        for start, stop in batches(self.shapes, self.pooled, self.granule):
            height = self.shapes[start][0]
            part = self.shapes[start:stop]
            shortest, longest = (pick(shape[1] for shape in part) for pick in (min, max))
            columns = (longest + self.pooled) * self.granule
            if columns == 0 or height == 0:
                continue
            r = self.order[start:stop]
            n = max(shape[2] for shape in part)
            short = longest - self.lengths[r].sum(1, keepdim=True)
            # [rows, n + 2]: the listed blocks, what fills the row up, the pooled keys
            first = torch.nn.functional.pad(self.firsts[r, :n], (0, 2), value=self.tokens)
            first[:, n] = self.zero
            length = (self.lengths[r, :n], short, torch.full_like(short, self.pooled))
            total = len(r) * (longest + self.pooled)
            wanted = runs(first + self.base[r, None], torch.cat(length, 1), total)
            if shortest < longest:
                last = (self.base[r] + self.zero)[:, None]
                wanted = wanted.view(len(r), -1).minimum(last).flatten()

            clean, bias, empty = shortest * self.granule, None, None
            if clean < columns:
                column = torch.arange(clean, longest * self.granule, device=device)
                bias = torch.zeros(len(r), len(column), dtype=self.precision, device=device)
                bias.masked_fill_(column >= (longest - short) * self.granule, -torch.inf)
                if self.tail_bias is not None:
                    bias = torch.cat((bias, self.tail_bias[r]), 1)
                if clean == 0:
                    # a softmax over nothing is NaN
                    empty = (bias == -torch.inf).all(1)
            yield Batch(r, height, columns, wanted, clean, bias, empty)


class Buffers:
    """Scratch memory that grows to the largest request and is handed out as views."""

    def __init__(self, new: dict) -> None:
        self.new = new
        self.held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, **self.new)
        return self.held[name][:size].view(shape)

    def gather(self, name: str, table: Tensor, ids: Tensor) -> Tensor:
        return torch.index_select(table, 0, ids, out=self.take(name, len(ids), table.shape[1]))


def slots(offsets: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Token number and validity of every slot of every block, both [N, block]."""
    token = offsets[:-1, None].long() + torch.arange(block, device=offsets.device)
    return token, token < offsets[1:, None]


def blocked(
    x: Tensor, ragged: tuple[Tensor, Tensor] | None, blocks: int, block: int, precision: torch.dtype
) -> Tensor:
    """[B, S, H, D] -> [B, H, blocks, block, D], a fresh copy."""
    B, S, H, D = x.shape
    if ragged is None:
        table = torch.empty(B, H, S, D, dtype=precision, device=x.device).copy_(x.transpose(1, 2))
        return table.view(B, H, blocks, block, D)
    token, valid = ragged
    if S == 0:
        return torch.zeros(B, H, blocks, block, D, dtype=precision, device=x.device)
    table = x.transpose(1, 2).index_select(2, token.clamp(max=S - 1).flatten()).to(precision)
    table = table.view(B, H, blocks, block, D)
    return table.masked_fill_(~valid[:, :, None], 0)


def runs(first: Tensor, length: Tensor, total: int) -> Tensor:
    """The numbers first[i], first[i] + 1, ... (length[i] of them), for every i in turn."""
    first, length = first.flatten(), length.flatten()
    shift = first - (length.cumsum(0) - length)
    number = torch.arange(total, device=first.device)
    return number.add_(shift.repeat_interleave(length, output_size=total))


def batches(shapes: list[list[int]], pooled: int, granule: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows to compute together, from each row's (height, granules, count).

    A range shares its height, differs in length by at most an eighth and fits into SCORES; rows
    without granules are never mixed with others.
    """
    start = 0
    while start < len(shapes):
        height, shortest, _ = shapes[start]
        longest = shortest
        stop = start + 1
        while stop < len(shapes) and shapes[stop][0] == height:
            low, high = min(shortest, shapes[stop][1]), max(longest, shapes[stop][1])
            scores = (stop + 1 - start) * height * (high + pooled) * granule
            if scores > SCORES or high > low + low // 8:
                break
            shortest, longest = low, high
            stop += 1
        yield start, stop
        start = stop


def unblocked(x: Tensor, ragged: tuple[Tensor, Tensor] | None) -> Tensor:
    """[B, H, N, block, D] -> [B, H, S, D], dropping the slots that hold no token."""
    flat = x.flatten(2, 3)
    if ragged is None:
        return flat
    return flat.index_select(2, ragged[1].flatten().nonzero()[:, 0])
