"""Block-sparse attention in torch operations: kept blocks are gathered, the rest never touched."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# scores held at a time: 2 MiB of float32 stays in a core's cache (a single row may exceed it)
SCORES = 1 << 19


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is not one of {DTYPES}"]


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    *,
    block_q: int,
    block_k: int,
    key_mask: Tensor | None,
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Rows (batch, head, query block) of similar length share a gather and two batched products.

    Keys move in granules, the longest runs of tokens that no block border cuts; rows are sorted,
    head by head, by their number of granules, so few columns are ever masked. Memory
    beyond the output: one copy of query, key and value, and buffers for `max(SCORES, one row)`
    scores and their keys and values. Counts and offsets are read on the host.
    """
    B, Sq, H, D = query.shape
    Skv, Hk = key.shape[1:3]
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    precision = torch.promote_types(query.dtype, torch.float32)
    new = {"dtype": precision, "device": query.device}

    q_slots = None if NQ * block_q == Sq else slots(query_offsets, block_q)
    q_rows = blocked(query, q_slots, NQ, block_q, precision).mul_(scale).view(-1, block_q, D)

    # first granule and number of granules of every key block, [B, NK]
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    if key_mask is None:
        granule = math.gcd(*key_offsets.tolist()) or 1
        ends = (key_offsets // granule).long().expand(B, -1)
    else:
        # valid tokens move to the front, in order, and a block owns what is left of it
        granule = 1
        valid_before = torch.nn.functional.pad(key_mask.long().cumsum(1), (1, 0))
        ends = valid_before[:, key_offsets.long()]
        front = key_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        sample = torch.arange(B, device=key.device)[:, None]
        key, value = key[sample, front], value[sample, front]
    block_first, block_length = ends[:, :-1], ends.diff()

    # one table of granules per operand and head: tokens, then pooled keys, then one of zeros
    keys, values, tail_bias = [key.transpose(1, 2)], [value.transpose(1, 2)], None
    tokens, pooled = Skv // granule, 0
    if tail is not None:
        key_mean, value_mean, weight, keep = tail
        pooled = -(-NK // granule)
        spare = pooled * granule - NK
        keys.append(torch.nn.functional.pad(key_mean, (0, 0, 0, spare)))
        values.append(torch.nn.functional.pad(value_mean, (0, 0, 0, spare)))
        tail_bias = weight.to(precision).log()[:, None, None].masked_fill(keep, -torch.inf)
        tail_bias = torch.nn.functional.pad(tail_bias, (0, spare), value=-torch.inf).flatten(0, 2)
    k_table, v_table = (granules(x, granule, precision) for x in (keys, values))
    zero = tokens + pooled

    rows = B * H * NQ
    row = torch.arange(rows, device=query.device)
    batch, head = row // (H * NQ), row // NQ % H
    base = (batch * Hk + head // (H // Hk)) * (zero + 1)
    listed = torch.arange(indices.shape[-1], device=query.device) < counts.reshape(rows, 1)
    lists = indices.reshape(rows, -1).long().masked_fill(~listed, 0)
    lengths = block_length[batch[:, None], lists].masked_fill_(~listed, 0)
    firsts = block_first[batch[:, None], lists]
    totals = lengths.sum(1)
    # head by head, whose keys then stay in cache; in it by query length (in 16s), then by keys
    heights = (query_offsets.diff().long() + 15) // 16 * 16
    heights = heights.clamp(max=block_q).repeat(B * H)
    order = (((batch * H + head) * (block_q + 1) + heights) * (Skv + 1) + totals).argsort()
    shapes = torch.stack((heights, totals, counts.reshape(rows)), 1)[order].tolist()

    out = torch.zeros(rows, block_q, D, **new)
    lse = torch.full((rows, block_q), -torch.inf, **new) if return_lse else None
    buffers = Buffers(new)
    for start, stop in batches(shapes, pooled, granule):
        height = shapes[start][0]
        shortest, longest = (pick(shape[1] for shape in shapes[start:stop]) for pick in (min, max))
        columns = (longest + pooled) * granule
        if columns == 0 or height == 0:
            continue
        r = order[start:stop]
        n = max(shape[2] for shape in shapes[start:stop])
        short = longest - lengths[r].sum(1, keepdim=True)
        # [rows, n + 2]: the listed blocks, what fills the row up, the pooled keys
        first = torch.nn.functional.pad(firsts[r, :n], (0, 2), value=tokens)
        first[:, n] = zero
        length = torch.cat((lengths[r, :n], short, torch.full_like(short, pooled)), 1)
        wanted = runs(first + base[r, None], length, len(r) * (longest + pooled))
        if shortest < longest:
            wanted = wanted.view(len(r), -1).minimum((base[r] + zero)[:, None]).flatten()
        k = buffers.gather("k", k_table, wanted).view(len(r), columns, D)
        v = buffers.gather("v", v_table, wanted).view(len(r), columns, D)
        s = buffers.take("s", len(r), height, columns)
        torch.bmm(q_rows[:, :height].index_select(0, r), k.mT, out=s)

        # everything left of `clean` is a real key in every row
        clean = shortest * granule
        empty = None
        if clean < columns:
            column = torch.arange(clean, longest * granule, device=query.device)
            bias = torch.zeros(len(r), len(column), **new)
            bias.masked_fill_(column >= (longest - short) * granule, -torch.inf)
            if tail_bias is not None:
                bias = torch.cat((bias, tail_bias[r]), 1)
            s[:, :, clean:].add_(bias[:, None])
            if clean == 0:
                # a softmax over nothing is NaN; such rows are computed over zeros and dropped
                empty = (bias == -torch.inf).all(1)
                s.masked_fill_(empty[:, None, None], 0)
        p = torch.softmax(s, -1, out=buffers.take("p", len(r), height, columns))
        o = torch.bmm(p, v)
        if empty is not None:
            o.masked_fill_(empty[:, None, None], 0)
        out[:, :height].index_copy_(0, r, o)
        if lse is not None:
            # the largest probability is exp(max - lse)
            found = s.amax(-1) - p.amax(-1).log()
            if empty is not None:
                found.masked_fill_(empty[:, None], -torch.inf)
            lse[:, :height].index_copy_(0, r, found)

    output = unblocked(out.view(B, H, NQ, block_q, D), q_slots)
    output = output.transpose(1, 2).to(query.dtype).contiguous()
    if lse is not None:
        lse = unblocked(lse.view(B, H, NQ, block_q, 1), q_slots)[..., 0].contiguous()
    return output, lse


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


def granules(parts: list[Tensor], granule: int, precision: torch.dtype) -> Tensor:
    """[B, H, S, D] parts -> [B * H * (granules + 1), granule * D]; each head's last is zero."""
    B, H, _, D = parts[0].shape
    total = sum(part.shape[2] for part in parts)
    table = torch.empty(B, H, total + granule, D, dtype=precision, device=parts[0].device)
    done = 0
    for part in parts:
        table[:, :, done : done + part.shape[2]] = part
        done += part.shape[2]
    table[:, :, done:] = 0
    return table.view(-1, granule * D)


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
