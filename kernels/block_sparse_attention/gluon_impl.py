"""Block-sparse attention on Hopper GPUs through Gluon: TMA, wgmma and warp specialisation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.hopper import (
    Plan,
    counter,
    counters_left,
    hopper_reasons,
    planned,
    tensor_map,
)

BLOCKS = 128
ROWS = 64
# padded head dim -> key tile, K/V stages, Q buffers, ping-pong, exponentials by polynomial
CONFIGS = {
    64: {"BN": 128, "ST": 4, "QST": 2, "PINGPONG": False, "POLYNOMIAL": True},
    128: {"BN": 128, "ST": 2, "QST": 2, "PINGPONG": False, "POLYNOMIAL": False},
}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    reasons = hopper_reasons(device, dtype, head_dim)
    return reasons or [reason for reason in (broken(device),) if reason]


@functools.cache
def broken(device: torch.device) -> str | None:
    """Why the kernel does not compile, or miscalculates, on this device and this triton."""
    if torch.cuda.is_current_stream_capturing():
        return "first used while a CUDA graph is captured"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, 1, 64, generator=generator).to(device, torch.float16)
               for _ in range(3))
    offsets = torch.tensor([0, 128, 256], dtype=torch.int32, device=device)
    indices = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=device)[None, None]
    counts = torch.tensor([[[2, 1]]], dtype=torch.int32, device=device)
    order = torch.tensor([1, 0], dtype=torch.int32, device=device)
    try:
        # each twice: the second launch takes the short way
        for begun in (None, None, order, order):
            found, _ = run(q, k, v, indices, counts, offsets, offsets, block_q=128, block_k=128,
                           key_mask=None, tail=None, scale=0.125, return_lse=False, order=begun)
    except Exception as error:  # whatever a compiler or driver throws is a reason
        return f"{type(error).__name__}: {error}"
    q, k, v = (x.float()[:, :, 0] for x in (q, k, v))
    scores = q @ k.mT * 0.125
    scores[:, 128:, :128] = -torch.inf
    error = (scores.softmax(-1) @ v - found[:, :, 0].float()).abs().max().item()
    if not error < 0.01:
        return f"wrong result on this device, largest error {error:.3g}"
    return counters_left(device)


def refusal(
    query: Tensor, key: Tensor, value: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> str | None:
    """Why this call cannot run here, or None."""
    if not ROWS < block_q <= BLOCKS:
        # one warpgroup alone was no faster than plain Triton
        return f"query blocks of {block_q} tokens: accepted are {ROWS + 1} to {BLOCKS}"
    if key.shape[1] == 0:
        return "no keys at all"
    if block_k > BLOCKS:
        return f"key blocks above {BLOCKS} tokens"
    for x in (query, key, value, *(() if tail is None else tail[:2])):
        if x.data_ptr() % 16 or any(n * x.element_size() % 16 for n in x.stride()[:3]):
            return "rows that do not start at multiples of 16 bytes"
    return None


def config(block_k: int, head_dim: int) -> dict[str, Any]:
    """Compile-time settings: one per head dim, no tuning at run time."""
    BD = 64 if head_dim <= 64 else 128
    SUB = max(16, 1 << (block_k - 1).bit_length())
    # a producer that gathers a tile from many blocks has more to keep in mind
    consumer, producer = (240, 24) if SUB > 32 else (232, 40)
    return {**CONFIGS[BD], "BD": BD, "NC": 2, "SUB": SUB,
            "CONSUMER_REGISTERS": consumer, "PRODUCER_REGISTERS": producer}


def run(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    query_offsets: Tensor, key_offsets: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None, scale: float,
    return_lse: bool, order: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One program per (batch, head, query block), heads outermost so that K and V stay in L2."""
    B, SQ, H, D = query.shape
    output = torch.empty(B, SQ, H, D, dtype=query.dtype, device=query.device)
    lse = None
    if return_lse:
        lse = torch.empty(B, H, SQ, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        # what is masked may be NaN, and its value row is multiplied by 0
        value = value.masked_fill(~key_mask[:, :, None, None], 0)
    plan = plan_of(
        query, key, value, indices, query_offsets, key_offsets, block_q=block_q, block_k=block_k,
        masked=key_mask is not None, tail=tail, scale=scale, return_lse=return_lse,
        ordered=order is not None)
    plan.launch(*tensors(query, key, value, indices, counts, query_offsets, key_offsets, output,
                         lse, counter(query), key_mask=key_mask, tail=tail, order=order))
    return output, lse


def tensors(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    query_offsets: Tensor, key_offsets: Tensor, output: Tensor, lse: Tensor | None, taken: Tensor,
    *, key_mask: Tensor | None, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    order: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of a launch: what its tensor maps map, and what it takes by pointer."""
    # what a setting switches off still needs a pointer
    weight = keep = mask = dirty = query_offsets
    mapped = (query, key, value, output)
    if tail is not None:
        weight, keep = tail[2].contiguous().log2(), tail[3].contiguous().view(torch.uint8)
        mapped += tail[:2]
    if key_mask is not None:
        mask, dirty = key_mask.view(torch.uint8), _dirty(key_mask, key_offsets)
    return mapped, (indices.contiguous(), counts.contiguous(), taken,
                    query_offsets if order is None else order, query_offsets, key_offsets,
                    weight, keep, mask, dirty, output, output if lse is None else lse)


def _dirty(key_mask: Tensor, key_offsets: Tensor) -> Tensor:
    """Whether a block has masked keys, uint8 [B, NK]."""
    before = torch.nn.functional.pad((~key_mask).cumsum(1, dtype=torch.int32), (1, 0))
    return (before[:, key_offsets.long()].diff(dim=1) != 0).to(torch.uint8)


def plan_of(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, query_offsets: Tensor,
    key_offsets: Tensor, *, block_q: int, block_k: int, masked: bool,
    tail: tuple[Tensor, Tensor, Tensor, Tensor] | None, scale: float, return_lse: bool,
    ordered: bool,
) -> Plan:
    """The plan of a call."""
    means = () if tail is None else (tail[0].stride(), tail[1].stride())
    known = ("block sparse", query.shape, query.stride(), key.shape, key.stride(), value.stride(),
             means, indices.shape, query_offsets.shape, key_offsets.shape, query.dtype,
             query.get_device(), block_q, block_k, masked, scale, return_lse, ordered)
    return planned(known, lambda: _plan(
        query, key, value, indices.shape[-1], query_offsets.numel() - 1, key_offsets.numel() - 1,
        block_q=block_q, block_k=block_k, masked=masked, tail=tail, scale=scale,
        return_lse=return_lse, ordered=ordered))


def _plan(
    query: Tensor, key: Tensor, value: Tensor, M: int, NQ: int, NK: int, *, block_q: int,
    block_k: int, masked: bool, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None, scale: float,
    return_lse: bool, ordered: bool,
) -> Plan:
    from .gluon_kernel import block_sparse_attention_hopper_kernel as kernel

    B, SQ, H, D = query.shape
    SKV, HK = key.shape[1:3]
    meta = config(block_k, D)
    BD, BN, SUB = meta.pop("BD"), meta["BN"], meta["SUB"]
    full_q, full_k = NQ * block_q == SQ, NK * block_k == SKV
    # blocks of at most block_q tokens: when only the last can be short, offsets say nothing new
    equal_q = block_q == meta["NC"] * ROWS and full_q
    equal_k = block_k == SUB and full_k
    strides = (SQ * H * D, H * D, D)
    maps = [_map(query, query.stride(), ROWS, BD), _map(key, key.stride(), SUB, BD),
            _map(value, value.stride(), SUB, BD), _map(query, (*strides, 1), ROWS, BD)]
    for mean in () if tail is None else tail[:2]:
        mean = mean.transpose(1, 2)
        maps.append(_map(mean, mean.stride(), SUB, BD))
    work, tiles = B * H * NQ, 0 if tail is None else -(-NK // BN)
    numbers = (
        *strides, SQ, SKV, H, H // HK, NQ, NK, M, work, tiles,
        # the kernel's exponentials are powers of two
        1 / (scale * 1.4426950408889634), scale * 1.4426950408889634,
    )
    settings = dict(
        meta, EQUAL_Q=equal_q, EQUAL_K=equal_k, MASK=not equal_k or SUB < BN, USE_MASK=masked,
        USE_TAIL=tail is not None, USE_LSE=return_lse, USE_ORDER=ordered, D=D, num_warps=4,
        maxnreg=168)
    maps += [None] * (6 - len(maps))
    return Plan(kernel, tuple(maps), numbers, settings, work)


def _map(x: Tensor, strides: tuple[int, ...], rows: int, BD: int) -> Any:
    """A tensor map of [B, S, H, D], like x but for its strides; its box: `rows` tokens, a head."""
    return tensor_map(x, x.shape, strides, (1, rows, 1, BD))
