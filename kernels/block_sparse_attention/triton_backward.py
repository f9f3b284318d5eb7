"""Gradients of block-sparse attention as plain Triton kernels: one over the lists, one over their
transpose, and one for the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting
from fastdiff.kernels.launch import large, launch, strides_in_units

# (padded head dim, 4-byte input) -> (largest BM, largest BN, warps, stages)
QUERY_CONFIGS = {
    (64, False): (128, 64, 8, 2),
    (128, False): (128, 64, 8, 2),
    (256, False): (128, 32, 8, 1),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 16, 4, 1),
    (256, True): (32, 16, 4, 1),
}
KEY_CONFIGS = {
    (64, False): (64, 128, 8, 2),
    (128, False): (64, 128, 8, 2),
    (256, False): (32, 64, 8, 1),
    (64, True): (32, 64, 4, 2),
    (128, True): (16, 64, 4, 1),
    (256, True): (16, 32, 4, 1),
}
# entries of the keep map that are sorted at a time: 0.5 GiB of int64
SORTED = 1 << 26
# programs that fill a large GPU a few times over
PROGRAMS = 512


def config(
    table: dict[tuple[int, bool], tuple[int, int, int, int]],
    block_q: int,
    block_k: int,
    like: Tensor,
) -> dict[str, int]:
    """Tile shape and launch shape: never wider than the blocks, no tuning at run time."""
    BD = max(16, 1 << (like.shape[-1] - 1).bit_length())
    BM, BN, warps, stages = table[max(64, BD), like.dtype.itemsize == 4]
    if not large(like.device):
        # four tiles of 16 KiB fit every card
        limit = max(16, (16 << 10) // (BD * like.dtype.itemsize))
        BM, BN, stages = min(BM, limit), min(BN, limit), 1
    BM = min(BM, max(16, 1 << (block_q - 1).bit_length()))
    BN = min(BN, max(16, 1 << (block_k - 1).bit_length()))
    warps = min(warps, max(1, max(BM, BN) * BD // 1024))
    return {"BM": BM, "BN": BN, "BD": BD, "num_warps": warps, "num_stages": stages}


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

    Probabilities come back from the scores and LSE. Sums are float32; probabilities and their
    gradients are rounded to the inputs' dtype for the products, float32 products run as three TF32
    passes. No atomics: a repeated call gives the same bits.
    """
    from .triton_backward_kernel import (
        block_sparse_attention_bwd_dkv_kernel,
        block_sparse_attention_bwd_dq_kernel,
        block_sparse_attention_bwd_tail_kernel,
    )

    B, Sq, H, D = query.shape
    Skv, Hk = key.shape[1:3]
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    dtype, device = query.dtype, query.device
    dq = torch.empty(B, Sq, H, D, dtype=dtype, device=device)
    dk, dv = (torch.empty(B, Skv, Hk, D, dtype=dtype, device=device) for _ in range(2))
    if dq.numel() == 0 or dk.numel() == 0:
        means = () if tail is None else tail[:2]
        return tuple(torch.zeros_like(x) for x in (query, key, value, *means))

    indices, counts = indices.contiguous(), counts.contiguous()
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    # an argument that a flag switches off still needs a pointer
    nothing = query_offsets
    mask = nothing if key_mask is None else key_mask.contiguous().view(torch.uint8)
    dlse = nothing if grad_lse is None else grad_lse.contiguous()
    key_mean = value_mean = weight = keep = nothing
    if tail is not None:
        key_mean, value_mean, weight, keep = (x.contiguous() for x in tail)
        keep = keep.view(torch.uint8)
    delta = torch.empty(B, H, Sq, dtype=torch.float32, device=device)

    strides, unit = strides_in_units(query, key, value, output, grad)
    q_steps, k_steps, v_steps, o_steps, do_steps = (strides[i : i + 3] for i in range(0, 15, 3))

    def shared(meta: dict[str, int]) -> dict[str, int]:
        full = NQ * block_q == Sq and block_q % meta["BM"] == 0
        parts = -(-block_q // meta["BM"])
        flags = {"D": D, "BLOCK_Q": block_q, "PARTS_Q": parts, "FULL_Q": full}
        return {**meta, **flags, "UPCAST": interpreting(), "UNIT": unit}

    meta = shared(config(QUERY_CONFIGS, block_q, block_k, query))
    launch(
        block_sparse_attention_bwd_dq_kernel, (NQ * meta["PARTS_Q"], B * H),
        query, key, value, output, grad, lse, dlse, delta, dq, indices, counts, query_offsets,
        key_offsets, mask, key_mean, value_mean, weight, keep, *strides,
        Sq, Skv, H, H // Hk, NQ, NK, indices.shape[-1], scale,
        BLOCK_K=block_k,
        PARTS_K=-(-block_k // meta["BN"]),
        # blocks of at most block_k tokens can only fill Skv when each is full
        FULL_K=NK * block_k == Skv and block_k % meta["BN"] == 0,
        EQUAL_K=NK * block_k == Skv,
        USE_MASK=key_mask is not None,
        USE_TAIL=tail is not None,
        USE_DLSE=grad_lse is not None,
        **meta,
    )  # fmt: skip

    meta = shared(config(KEY_CONFIGS, block_q, block_k, query))
    equal_q = NQ * block_q == Sq
    parts_k = -(-block_k // meta["BN"])
    launch(
        block_sparse_attention_bwd_dkv_kernel, (NK * parts_k, B * Hk),
        query, key, value, grad, lse, delta, dk, dv,
        *transposed(indices, counts, NK), query_offsets, key_offsets, mask,
        *q_steps, *k_steps, *v_steps, *do_steps, Sq, Skv, H, H // Hk, NQ, NK, scale,
        PARTS_K=parts_k,
        EQUAL_Q=equal_q,
        USE_MASK=key_mask is not None,
        **meta,
    )  # fmt: skip
    if tail is None:
        return dq, dk, dv

    # a tile of means meets every query, so the queries are split until the device is full
    meta = shared(config(KEY_CONFIGS, block_q, NK, query))
    tiles = -(-NK // meta["BN"])
    splits = max(1, min(NQ, PROGRAMS // (tiles * B * Hk)))
    dk_mean, dv_mean = (
        torch.empty(splits, B, Hk, NK, D, dtype=torch.float32, device=device) for _ in range(2)
    )
    launch(
        block_sparse_attention_bwd_tail_kernel, (tiles, B * Hk, splits),
        query, grad, lse, delta, key_mean, value_mean, weight, keep, query_offsets,
        dk_mean, dv_mean, *q_steps, *do_steps, Sq, H, H // Hk, NQ, NK, splits, scale,
        EQUAL_Q=equal_q,
        **meta,
    )  # fmt: skip
    return dq, dk, dv, dk_mean.sum(0).to(dtype), dv_mean.sum(0).to(dtype)


def transposed(indices: Tensor, counts: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The lists by key block: int32 [B, H, NK, NQ] of query blocks, ascending, and [B, H, NK].

    Nothing is read on the host. Temporary memory: 24 bytes for each of at most SORTED entries.
    """
    B, H, NQ, M = indices.shape
    rows_i, rows_c = indices.view(B * H, NQ, M), counts.view(B * H, NQ)
    listed = torch.arange(M, dtype=torch.int32, device=indices.device)
    lists, lengths = [], []
    step = max(1, SORTED // max(1, NQ * max(M, blocks)))
    for begin in range(0, B * H, step):
        part = slice(begin, begin + step)
        # what lies beyond the count goes into one extra column, then that column goes
        slots = torch.where(listed < rows_c[part, :, None], rows_i[part], blocks).long()
        kept = torch.zeros(*slots.shape[:2], blocks + 1, dtype=torch.bool, device=indices.device)
        kept = kept.scatter_(-1, slots, True)[..., :blocks].mT
        lengths.append(kept.sum(-1, dtype=torch.int32))
        lists.append((~kept).to(torch.uint8).argsort(dim=-1, stable=True).int())
    return torch.cat(lists).contiguous(), torch.cat(lengths)
