"""Gradients of block-sparse attention in torch operations, over the rows of the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_rows import Buffers, Rows


def run(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
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
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, then of the tail's two means where there is a tail.

    Probabilities are computed again from the scores and LSE, row batch by row batch; gradients of
    keys and values are added up in tables laid out like theirs. Memory beyond the results: copies
    of all inputs and gradients, and buffers for `max(SCORES, one row)` scores, twice.
    """
    D = query.shape[3]
    rows = Rows(
        query, key, indices, counts, query_offsets, key_offsets,
        block_q=block_q, key_mask=key_mask, tail=tail,
    )  # fmt: skip
    new = {"dtype": rows.precision, "device": query.device}
    # scores, and so the gradient of key, hold the scale
    q_rows = rows.of_queries(query).mul_(scale)
    do_rows = rows.of_queries(grad)
    k_table = rows.table(key, None if tail is None else tail[0])
    v_table = rows.table(value, None if tail is None else tail[1])

    # the softmax's own term: every score's gradient is p * (dp - delta)
    delta = (grad.to(rows.precision) * output).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta -= grad_lse.transpose(1, 2)[..., None]
    delta = rows.of_queries(delta)
    # a query without keys has LSE -inf; from +inf all its probabilities come out zero
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    lse_rows = rows.of_queries(lse.transpose(1, 2)[..., None])

    dq_rows = torch.zeros_like(q_rows)
    dk_table, dv_table = torch.zeros_like(k_table), torch.zeros_like(v_table)
    buffers = Buffers(new)
    for batch in rows.batches():
        r, height, columns = batch.rows, batch.height, batch.columns
        q, do, shift, own = (
            x[:, :height].index_select(0, r) for x in (q_rows, do_rows, lse_rows, delta)
        )
        k = buffers.gather("k", k_table, batch.wanted).view(len(r), columns, D)
        v = buffers.gather("v", v_table, batch.wanted).view(len(r), columns, D)
        p = batch.mask(torch.bmm(q, k.mT, out=buffers.take("p", len(r), height, columns)))
        p.sub_(shift).exp_()
        added = torch.bmm(p.mT, do, out=buffers.take("kv", len(r), columns, D))
        dv_table.index_add_(0, batch.wanted, added.view(len(batch.wanted), -1))
        ds = torch.bmm(do, v.mT, out=buffers.take("ds", len(r), height, columns))
        ds.sub_(own).mul_(p)
        dq_rows[:, :height].index_copy_(0, r, torch.bmm(ds, k))
        torch.bmm(ds.mT, q, out=added)
        dk_table.index_add_(0, batch.wanted, added.view(len(batch.wanted), -1))

    dq = rows.to_queries(dq_rows.mul_(scale), query.shape).transpose(1, 2)
    dk, dk_mean = rows.from_table(dk_table, key, key_offsets.numel() - 1)
    dv, dv_mean = rows.from_table(dv_table, value, key_offsets.numel() - 1)
    found = (dq, dk, dv) if tail is None else (dq, dk, dv, dk_mean, dv_mean)
    return tuple(x.to(query.dtype) for x in found)
