"""Block-sparse attention on Hopper GPUs through Gluon: TMA, wgmma and warp specialisation."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 128)
BLOCKS = 128
ROWS = 64
# places in the kernel's arguments: tensors passed by pointer, and the largest stride
POINTERS, STRIDE = slice(6, 18), 18

# padded head dim -> key tile, K/V stages, Q buffers, ping-pong
CONFIGS = {
    64: {"BN": 128, "ST": 4, "QST": 2, "PINGPONG": False},
    128: {"BN": 128, "ST": 2, "QST": 2, "PINGPONG": False},
}


def not_supported_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"device {device} is not an NVIDIA GPU"]
    reasons = []
    if torch.cuda.get_device_capability(device)[0] != 9:
        reasons.append("not a Hopper GPU (compute capability 9)")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {DTYPES}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1] or head_dim % 8:
        reasons.append(f"head_dim {head_dim} is not a multiple of 8 in {HEAD_DIMS}")
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
    try:
        # twice: the second launch takes the short way
        for _ in range(2):
            found, _ = run(q, k, v, indices, counts, offsets, offsets, block_q=128, block_k=128,
                           key_mask=None, tail=None, scale=0.125, return_lse=False)
    except Exception as error:  # whatever a compiler or driver throws is a reason
        return f"{type(error).__name__}: {error}"
    q, k, v = (x.float()[:, :, 0] for x in (q, k, v))
    scores = q @ k.mT * 0.125
    scores[:, 128:, :128] = -torch.inf
    error = (scores.softmax(-1) @ v - found[:, :, 0].float()).abs().max().item()
    return None if error < 0.01 else f"wrong result on this device, largest error {error:.3g}"


def refusal(
    query: Tensor, key: Tensor, value: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> str | None:
    """Why this call cannot run here, or None."""
    if not ROWS < block_q <= BLOCKS:
        # one warpgroup alone was no faster than plain Triton
        return f"query blocks of {block_q} tokens: accepted are {ROWS + 1} to {BLOCKS}"
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
    return {**CONFIGS[BD], "BD": BD, "NC": 2, "SUB": SUB,
            "CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    query_offsets: Tensor, key_offsets: Tensor, *, block_q: int, block_k: int,
    key_mask: Tensor | None, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None, scale: float,
    return_lse: bool, **changes: Any,
) -> tuple[Tensor, Tensor | None]:
    """One program per (batch, head, query block), heads outermost so that K and V stay in L2."""
    from .gluon_kernel import block_sparse_attention_hopper_kernel as kernel

    told = refusal(query, key, value, block_q=block_q, block_k=block_k, key_mask=key_mask,
                   tail=tail)
    if told is not None:
        raise ValueError(f"the gluon implementation does not take {told}")
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
    args, settings, programs = arguments(
        query, key, value, indices.contiguous(), counts.contiguous(), query_offsets, key_offsets,
        output, lse, block_q=block_q, block_k=block_k, key_mask=key_mask, tail=tail, scale=scale,
        **changes)
    _launch(kernel, args, settings, programs, query)
    for found in args[:6]:
        found.base = None
    return output, lse


def _dirty(key_mask: Tensor, key_offsets: Tensor) -> Tensor:
    """Whether a block has masked keys, uint8 [B, NK]."""
    before = torch.nn.functional.pad((~key_mask).cumsum(1, dtype=torch.int32), (1, 0))
    return (before[:, key_offsets.long()].diff(dim=1) != 0).to(torch.uint8)


_compiled: dict[tuple, Any] = {}


def _launch(
    kernel: Any, args: tuple, settings: dict[str, Any], programs: int, query: Tensor
) -> None:
    """Launch; a kernel that was launched before goes past triton's look at every argument.

    That look costs more host time than the rest of the call. It decides by what `key` holds, by
    whether pointers are multiples of 16 bytes, and by whether numbers fit 32 bits.
    """
    key = (query.device, query.dtype, *settings.values())
    plain = all(x.data_ptr() % 16 == 0 for x in args[POINTERS]) and args[STRIDE] < 1 << 31
    ready = _compiled.get(key) if plain else None
    if ready is not None:
        constants = [settings[name] for name in kernel.arg_names[len(args):]]
        ready[(programs, 1, 1)](*args, *constants)
        return
    found = kernel[(programs,)](*args, **settings)
    if plain:
        _compiled[key] = found


@functools.lru_cache(maxsize=64)
def _layout(rows: int, BD: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, BD], element)


def _descriptor(role: str, x: Tensor, rows: int, BD: int) -> Any:
    """A tensor map of [B, S, H, D] whose box is `rows` tokens of one head.

    Making one checks a lot; one of the same role, shape and strides is taken again.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    known = _made.descriptors
    key = (role, x.shape, x.stride(), x.dtype, rows)
    if key not in known:
        if len(known) >= DESCRIPTORS:
            known.clear()
        known[key] = TensorDescriptor(
            x, list(x.shape), list(x.stride()), [1, rows, 1, BD], _layout(rows, BD, x.dtype))
    found = known[key]
    found.base = x
    return found


class _Made(threading.local):
    """Descriptors by role and shape, for one thread: their tensor changes at every call."""

    def __init__(self) -> None:
        self.descriptors: dict[Any, Any] = {}


_made = _Made()
DESCRIPTORS = 256


def arguments(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor,
    query_offsets: Tensor, key_offsets: Tensor, output: Tensor, lse: Tensor | None, *,
    block_q: int, block_k: int, tail: tuple[Tensor, Tensor, Tensor, Tensor] | None, scale: float,
    key_mask: Tensor | None = None, order: Tensor | None = None, programs: int | None = None,
    **changes: Any,
) -> tuple[tuple, dict[str, Any], int]:
    """(arguments, compile-time settings, programs) of one launch."""
    B, SQ, H, D = query.shape
    SKV, HK = key.shape[1:3]
    NQ, NK = query_offsets.numel() - 1, key_offsets.numel() - 1
    meta = {**config(block_k, D), **changes}
    BD, BN, SUB = meta.pop("BD"), meta["BN"], meta["SUB"]
    full_q, full_k = NQ * block_q == SQ, NK * block_k == SKV
    # blocks of at most block_q tokens: when only the last can be short, offsets say nothing new
    equal_q = block_q == meta["NC"] * ROWS and full_q
    equal_k = block_k == SUB and full_k
    if tail is None:
        tiles = 0
        weight = keep = query_offsets
    else:
        weight, keep = tail[2].log2(), tail[3].contiguous().view(torch.uint8)
        tiles = -(-NK // BN)
    mask = dirty = query_offsets
    if key_mask is not None:
        mask, dirty = key_mask.view(torch.uint8), _dirty(key_mask, key_offsets)
    work = B * H * NQ
    k_map, v_map = _descriptor("k", key, SUB, BD), _descriptor("v", value, SUB, BD)
    km_map, vm_map = k_map, v_map
    if tail is not None:
        km_map = _descriptor("k mean", tail[0].transpose(1, 2), SUB, BD)
        vm_map = _descriptor("v mean", tail[1].transpose(1, 2), SUB, BD)
    args = (
        _descriptor("q", query, ROWS, BD), k_map, v_map, _descriptor("o", output, ROWS, BD),
        km_map, vm_map,
        indices, counts, counts if order is None else order,
        torch.zeros(1, dtype=torch.int32, device=query.device), query_offsets, key_offsets, weight,
        keep, mask, dirty, output, output if lse is None else lse, *output.stride()[:3],
        SQ, SKV, H, H // HK, NQ, NK, indices.shape[-1], work, tiles,
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
    )
    kwargs = dict(
        meta, EQUAL_Q=equal_q, EQUAL_K=equal_k, MASK=not equal_k or SUB < BN,
        USE_MASK=key_mask is not None, USE_TAIL=tail is not None, USE_ORDER=order is not None,
        USE_LSE=lse is not None, D=D, num_warps=4, maxnreg=168,
    )
    return args, kwargs, min(work, programs or _multiprocessors(query.device))
