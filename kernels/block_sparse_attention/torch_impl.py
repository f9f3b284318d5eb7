"""Block-sparse attention in torch operations: kept blocks are gathered, the rest is never touched."""

from __future__ import annotations

import math

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
    """Rows (batch, head, query block) of equal count go together through two batched products.

    Memory beyond the output: one blocked copy of query, key and value, and buffers of
    `max(SCORES, one row)` scores and the keys and values of those rows. Reads counts on the host.
    """
    B, Sq, H, D = query.shape
    Skv, Hk = key.shape[1:3]
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    precision = torch.promote_types(query.dtype, torch.float32)
    new = dict(dtype=precision, device=query.device)

    # a table of blocks per operand: [B, heads, blocks, block, D], short blocks filled up with zeros
    q_slots = None if NQ * block_q == Sq else slots(query_offsets, block_q)
    k_slots = None if NK * block_k == Skv else slots(key_offsets, block_k)
    q_table = blocked(query, q_slots, NQ, block_q, precision).mul_(scale)
    k_table = blocked(key, k_slots, NK, block_k, precision)
    v_table = blocked(value, k_slots, NK, block_k, precision)
    bias = key_bias(key_mask, k_slots, B, NK, block_k, precision)
    if key_mask is not None:
        # a masked key's weight is zero, but zero times NaN would still be NaN
        hidden = (bias == -torch.inf)[:, None, :, :, None]
        k_table.masked_fill_(hidden, 0)
        v_table.masked_fill_(hidden, 0)

    pooled = 0
    tail_bias = None
    if tail is not None:
        # the pooled keys become further blocks of the same table, so one gather fetches both
        key_mean, value_mean, weight, keep = tail
        pooled = -(-NK // block_k)
        spare = pooled * block_k - NK
        k_table = torch.cat((k_table, pooled_blocks(key_mean, pooled, block_k, precision)), 2)
        v_table = torch.cat((v_table, pooled_blocks(value_mean, pooled, block_k, precision)), 2)
        tail_bias = weight.to(precision).log()[:, None, None].masked_fill(keep, -torch.inf)
        tail_bias = torch.nn.functional.pad(tail_bias, (0, spare), value=-torch.inf).flatten(0, 2)

    rows = B * H * NQ
    q_rows = q_table.reshape(rows, block_q, D)
    k_rows, v_rows = (x.reshape(B * Hk * (NK + pooled), block_k * D) for x in (k_table, v_table))
    lists = indices.reshape(rows, indices.shape[-1])
    row = torch.arange(rows, device=query.device)
    batch, head = row // (H * NQ), row // NQ % H
    first = (batch * Hk + head // (H // Hk)) * (NK + pooled)
    pooled_ids = torch.arange(NK, NK + pooled, device=query.device)

    out = torch.zeros(rows, block_q, D, **new)
    lse = torch.full((rows, block_q), -torch.inf, **new) if return_lse else None
    order = counts.reshape(rows).argsort()
    sizes = torch.bincount(counts.reshape(rows).long()).tolist() if rows else []
    buffers = Buffers(new)
    done = 0
    for count, size in enumerate(sizes):
        blocks = count + pooled
        columns = blocks * block_k
        chunk = max(1, SCORES // max(1, block_q * columns))
        if blocks == 0:
            done += size
            continue
        for start in range(done, done + size, chunk):
            r = order[start : min(start + chunk, done + size)]
            ids = lists.narrow(1, 0, count).index_select(0, r).long()
            wanted = torch.cat((ids, pooled_ids.expand(len(r), -1)), 1) if pooled else ids
            wanted = (wanted + first[r, None]).flatten()
            k = buffers.gather("k", k_rows, wanted).view(len(r), columns, D)
            v = buffers.gather("v", v_rows, wanted).view(len(r), columns, D)
            s = buffers.take("s", len(r), block_q, columns)
            torch.bmm(q_rows.index_select(0, r), k.mT, out=s)
            added = None
            if bias is not None:
                added = bias[batch[r, None], ids].flatten(1)
                if tail_bias is not None:
                    added = torch.cat((added, tail_bias[r]), 1)
            elif tail_bias is not None:
                s[:, :, count * block_k :].add_(tail_bias[r, None])
                if count == 0:
                    added = tail_bias[r]
            empty = None
            if added is not None:
                empty = (added == -torch.inf).all(1)
                if bias is not None:
                    s.add_(added[:, None])
                # a softmax over nothing is NaN; such rows are computed over zeros and dropped
                s.masked_fill_(empty[:, None, None], 0)
            p = torch.softmax(s, -1, out=buffers.take("p", len(r), block_q, columns))
            o = torch.bmm(p, v)
            if empty is not None:
                o.masked_fill_(empty[:, None, None], 0)
            out.index_copy_(0, r, o)
            if lse is not None:
                # the largest probability is exp(max - lse)
                found = s.amax(-1) - p.amax(-1).log()
                if empty is not None:
                    found.masked_fill_(empty[:, None], -torch.inf)
                lse.index_copy_(0, r, found)
        done += size

    output = unblocked(out.view(B, H, NQ, block_q, D), query_offsets, q_slots, Sq)
    output = output.transpose(1, 2).to(query.dtype).contiguous()
    if lse is not None:
        lse = unblocked(lse.view(B, H, NQ, block_q, 1), query_offsets, q_slots, Sq)[..., 0]
        lse = lse.contiguous()
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


def pooled_blocks(mean: Tensor, blocks: int, block: int, precision: torch.dtype) -> Tensor:
    """[B, H, NK, D] -> [B, H, blocks, block, D], filled up with zeros."""
    mean = torch.nn.functional.pad(mean.to(precision), (0, 0, 0, blocks * block - mean.shape[2]))
    return mean.unflatten(2, (blocks, block))


def key_bias(
    key_mask: Tensor | None,
    ragged: tuple[Tensor, Tensor] | None,
    batch: int,
    blocks: int,
    block: int,
    precision: torch.dtype,
) -> Tensor | None:
    """0 for a key that counts and -inf for one that does not, [B, NK, block]; None: all count."""
    if key_mask is None and ragged is None:
        return None
    if ragged is None:
        valid = key_mask.view(batch, blocks, block)
    else:
        token, inside = ragged
        valid = inside.expand(batch, -1, -1)
        if key_mask is not None and key_mask.shape[1]:
            valid = valid & key_mask[:, token.clamp(max=key_mask.shape[1] - 1)]
    zeros = torch.zeros(batch, blocks, block, dtype=precision, device=valid.device)
    return zeros.masked_fill_(~valid, -torch.inf)


def unblocked(
    x: Tensor, offsets: Tensor, ragged: tuple[Tensor, Tensor] | None, tokens: int
) -> Tensor:
    """[B, H, N, block, D] -> [B, H, S, D], dropping the slots that hold no token."""
    flat = x.flatten(2, 3)
    if ragged is None:
        return flat
    slot = ragged[1].flatten().nonzero()[:, 0]
    return flat.index_select(2, slot)
