"""Block-sparse attention as one plain Triton kernel: pointer loads, online softmax in base 2."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.kernels.availability import interpreting, triton_reasons
from fastdiff.kernels.launch import large, launch, strides_in_units

# (padded head dim, 4-byte input) -> (largest BM, largest BN, warps, stages)
CONFIGS = {
    (64, False): (64, 64, 4, 3),
    (128, False): (64, 64, 4, 3),
    (256, False): (128, 32, 8, 2),
    (64, True): (64, 32, 4, 2),
    (128, True): (64, 16, 4, 2),
    (256, True): (64, 16, 4, 1),
}
# with a tail, whose loop would else run short of registers
TAIL_CONFIGS = {**CONFIGS, (64, False): (64, 128, 4, 2)}
# for cards with less shared memory than Hopper's, down to the 99 KiB of the smallest
SMALL_CONFIGS = {
    **CONFIGS,
    (128, False): (64, 64, 4, 2),
    (256, False): (64, 16, 4, 2),
    (256, True): (32, 16, 4, 1),
}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return triton_reasons(device, dtype, head_dim)


def config(block_q: int, block_k: int, like: Tensor, tail: bool) -> dict[str, int]:
    """Tile shape and launch shape: never wider than the blocks, no tuning at run time."""
    BD = max(16, 1 << (like.shape[-1] - 1).bit_length())
    table = TAIL_CONFIGS if tail else CONFIGS
    if not large(like.device):
        table = SMALL_CONFIGS
    BM, BN, warps, stages = table[max(64, BD), like.dtype.itemsize == 4]
    BM = min(BM, max(16, 1 << (block_q - 1).bit_length()))
    BN = min(BN, max(16, 1 << (block_k - 1).bit_length()))
    warps = min(warps, max(1, BM // 16))
    return {"BM": BM, "BN": BN, "BD": BD, "num_warps": warps, "num_stages": stages}


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
    """One program per (batch, head, query tile), heads outermost so that K and V stay in L2.

    Scores, softmax and sums are float32; probabilities are rounded to value's dtype for the second
    product, float32 products run as three TF32 passes.
    """
    from .triton_kernel import block_sparse_attention_fwd_kernel

    B, Sq, H, D = query.shape
    Skv, Hk = key.shape[1:3]
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    output = torch.empty(B, Sq, H, D, dtype=query.dtype, device=query.device)
    lse = None
    if return_lse:
        lse = torch.empty(B, H, Sq, dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse

    indices, counts = indices.contiguous(), counts.contiguous()
    # an argument that a flag switches off still needs a pointer
    nothing = query_offsets
    mask = nothing if key_mask is None else key_mask.contiguous().view(torch.uint8)
    key_mean = value_mean = weight = keep = nothing
    if tail is not None:
        key_mean, value_mean, weight, keep = tail
        key_mean, value_mean = (x if x.stride(-1) == 1 else x.contiguous() for x in tail[:2])
        weight, keep = weight.contiguous(), keep.contiguous().view(torch.uint8)

    means = () if tail is None else (key_mean, value_mean)
    strides, unit = strides_in_units(query, key, value, output, *means)
    strides += [0] * (18 - len(strides))

    meta = config(block_q, block_k, query, tail is not None)
    parts_q, parts_k = -(-block_q // meta["BM"]), -(-block_k // meta["BN"])
    launch(
        block_sparse_attention_fwd_kernel, (NQ * parts_q, B * H),
        query,
        key,
        value,
        output,
        output if lse is None else lse,
        indices,
        counts,
        nothing if order is None else order,
        query_offsets,
        key_offsets,
        mask,
        key_mean,
        value_mean,
        weight,
        keep,
        *strides,
        Sq,
        Skv,
        H,
        H // Hk,
        NQ,
        NK,
        indices.shape[-1],
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
        D=D,
        BLOCK_Q=block_q,
        BLOCK_K=block_k,
        PARTS_Q=parts_q,
        PARTS_K=parts_k,
        # blocks of at most block_k tokens can only fill Skv when each is full
        FULL_Q=NQ * block_q == Sq and block_q % meta["BM"] == 0,
        FULL_K=NK * block_k == Skv and block_k % meta["BN"] == 0,
        EQUAL_K=NK * block_k == Skv,
        USE_MASK=key_mask is not None,
        USE_TAIL=tail is not None,
        USE_LSE=return_lse,
        USE_ORDER=order is not None,
        UPCAST=interpreting(),
        UNIT=unit,
        **meta,
    )
    return output, lse
