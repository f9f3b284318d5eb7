"""The meaning of gathering into tiles: a permutation, then a mean a tile."""

from __future__ import annotations

from torch import Tensor

from fastdiff.kernels.block_pool import block_pool
from fastdiff.kernels.token_permute import permute_tokens


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return []


def run(
    query: Tensor, key: Tensor, value: Tensor, order: Tensor, offsets: Tensor, *, block: int,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:
    q, k, v = (permute_tokens(x, order, impl="torch") for x in (query, key, value))
    mask = None if mask is None else mask[:, order]
    key_mean, weight = block_pool(k, offsets, block=block, mask=mask, impl="torch")
    value_mean, _ = block_pool(v, offsets, block=block, mask=mask, impl="torch")
    return q, k, v, key_mean, value_mean, weight
