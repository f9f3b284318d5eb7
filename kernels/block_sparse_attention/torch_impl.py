"""Block-sparse attention in torch operations: kept blocks are gathered, the rest never touched."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_rows import Buffers, Rows

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rows (batch, head, query block) of similar length share a gather and two batched products.

    Memory beyond the output: one copy of query, key and value, and buffers for `max(SCORES, one
    row)` scores and their keys and values. Counts and offsets are read on the host.
    """
    B, _, H, D = query.shape
    rows = Rows(
        query, key, indices, counts, query_offsets, key_offsets,
        block_q=block_q, key_mask=key_mask, tail=tail,
    )  # fmt: skip
    new = {"dtype": rows.precision, "device": query.device}
    q_rows = rows.of_queries(query).mul_(scale)
    k_table = rows.table(key, None if tail is None else tail[0])
    v_table = rows.table(value, None if tail is None else tail[1])

    out = torch.zeros(rows.count, block_q, D, **new)
    lse = torch.full((rows.count, block_q), -torch.inf, **new) if return_lse else None
    buffers = Buffers(new)
    for batch in rows.batches():
        r, height, columns = batch.rows, batch.height, batch.columns
        k = buffers.gather("k", k_table, batch.wanted).view(len(r), columns, D)
        v = buffers.gather("v", v_table, batch.wanted).view(len(r), columns, D)
        s = buffers.take("s", len(r), height, columns)
        torch.bmm(q_rows[:, :height].index_select(0, r), k.mT, out=s)
        batch.mask(s)
        p = torch.softmax(s, -1, out=buffers.take("p", len(r), height, columns))
        o = torch.bmm(p, v)
        if batch.empty is not None:
            o.masked_fill_(batch.empty[:, None, None], 0)
        out[:, :height].index_copy_(0, r, o)
        if lse is not None:
            # the largest probability is exp(max - lse)
            found = s.amax(-1) - p.amax(-1).log()
            if batch.empty is not None:
                found.masked_fill_(batch.empty[:, None], -torch.inf)
            lse[:, :height].index_copy_(0, r, found)

    output = rows.to_queries(out, query.shape).transpose(1, 2).to(query.dtype).contiguous()
    if lse is not None:
        shape = torch.Size((B, query.shape[1], H, 1))
        lse = rows.to_queries(lse, shape)[..., 0].contiguous()
    return output, lse
