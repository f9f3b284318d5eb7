"""The queries outside the grid: dense attention over everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fill_text(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, before: int, grid_tokens: int,
    key_mask: Tensor | None, scale: float,
) -> None:
    """Write the rows of `output` [B, S, H, D] that are not in the grid."""
    end = before + grid_tokens
    if query.shape[1] == grid_tokens:
        return
    rows = query[:, end:] if before == 0 else query[:, :before]
    if before and end < query.shape[1]:
        rows = torch.cat((rows, query[:, end:]), 1)
    q, k, v = (x.transpose(1, 2) for x in (rows, key, value))
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    mask = None if key_mask is None else key_mask[:, None, None]
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, **gqa)
    if mask is not None:
        # a query that sees no key gets zeros
        found = found.masked_fill(~mask.any(-1, keepdim=True), 0)
    found = found.transpose(1, 2)
    output[:, :before] = found[:, :before]
    output[:, end:] = found[:, before:]
