"""Window attention on Hopper GPUs through Gluon: TMA, wgmma and warp specialisation."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor

from .geometry import Window, boxes, table
from .text import fill_text

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 128)
ROWS, KEYS = 128, 128
# padded head dim -> K/V stages, Q buffers
CONFIGS = {64: {"ST": 4, "QST": 2}, 128: {"ST": 2, "QST": 2}}


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    device, dtype, head_dim = query.device, query.dtype, query.shape[-1]
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"device {device} is not an NVIDIA GPU"]
    reasons = []
    if torch.cuda.get_device_capability(device)[0] != 9:
        reasons.append("not a Hopper GPU (compute capability 9)")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {DTYPES}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1] or head_dim % 8:
        reasons.append(f"head_dim {head_dim} is not a multiple of 8 in {HEAD_DIMS}")
    for x in (query, key, value):
        if x.data_ptr() % 16 or any(n * x.element_size() % 16 for n in x.stride()[:3]):
            reasons.append("rows that do not start at multiples of 16 bytes")
            break
    return reasons or [reason for reason in (broken(device),) if reason]


@functools.cache
def broken(device: torch.device) -> str | None:
    """Why the kernel does not compile, or miscalculates, on this device and this triton."""
    if torch.cuda.is_current_stream_capturing():
        return "first used while a CUDA graph is captured"
    window = Window((1, 15, 20), (1, 7, 9))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 305, 1, 64, generator=generator).to(device, torch.float16)
               for _ in range(3))
    try:
        # twice: the second launch takes the short way
        for _ in range(2):
            found = run(q, k, v, window, before=0, key_mask=None, scale=0.125)
    except Exception as error:  # whatever a compiler or driver throws is a reason
        return f"{type(error).__name__}: {error}"
    low, high = table(window, device)
    coordinates = [torch.arange(n, device=device) for n in window.grid]
    visible = torch.ones((), dtype=torch.bool, device=device)
    at = 0
    for n, place in zip(window.grid, torch.meshgrid(*coordinates, indexing="ij"), strict=True):
        place = place.flatten()
        first, end = (side[at : at + n][place][:, None] for side in (low, high))
        visible = visible & (place >= first) & (place < end)
        at += n
    visible = torch.nn.functional.pad(visible, (0, 5, 0, 5), value=True)
    q, k, v = (x.float()[0, :, 0] for x in (q, k, v))
    scores = (q @ k.mT * 0.125).masked_fill(~visible, -torch.inf)
    error = (scores.softmax(-1) @ v - found[0, :, 0].float()).abs().max().item()
    return None if error < 0.01 else f"wrong result on this device, largest error {error:.3g}"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def run(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, before: int,
    key_mask: Tensor | None, scale: float,
) -> Tensor:
    """One launch a sample: a tensor map has five dimensions, all taken by grid, head and D."""
    from .gluon_kernel import window_attention_hopper_kernel as kernel

    B, S, H, D = query.shape
    output = torch.empty(B, S, H, D, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    fill_text(output, query, key, value, before=before, grid_tokens=window.tokens,
              key_mask=key_mask, scale=scale)
    # of each sample the next work item, and whether any key of its grid is masked: known on the
    # device only. 16 bytes apart, as every pointer is that goes into a kernel
    state = torch.zeros(B, 8, dtype=torch.int32, device=query.device)
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        state[:, 4] = (~key_mask[:, before : before + window.tokens]).any(1)
    for b in range(B):
        args, settings, programs = arguments(
            query[b], key[b], value[b], output[b], window, state[b], before=before,
            key_mask=None if key_mask is None else key_mask[b], scale=scale,
            programs=_multiprocessors(query.device))
        kernel[(programs,)](*args, **settings)
        for found in args[:6]:
            found.base = None
    return output


def arguments(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, window: Window, state: Tensor, *,
    before: int, key_mask: Tensor | None, scale: float, programs: int,
) -> tuple[tuple, dict[str, Any], int]:
    """(arguments, compile-time settings, programs) of the launch of one sample, [S, H, D]."""
    S, H, D = query.shape
    BD = 64 if D <= 64 else 128
    found = boxes(window, ROWS, KEYS)
    # the second warpgroup takes the farther half of the box, along its first axis that can be split
    split = next(i for i in range(3) if found.query[i] > 1)
    half = [n // 2 if i == split else n for i, n in enumerate(found.query)]
    start = [n if i == split else 0 for i, n in enumerate(half)]
    tiles = found.tiles[0] * found.tiles[1] * found.tiles[2]
    frames, height, width = window.grid
    end = before + window.tokens
    low, high = table(window, query.device)
    maps = [_grid_map(role, x, window, before, sides, BD) for role, x, sides in (
        ("q", query, half), ("k", key, found.key), ("v", value, found.key), ("o", output, half))]
    maps += [_text_map(role, x, BD) for role, x in (("k", key), ("v", value))]
    mask = low if key_mask is None else key_mask.view(torch.uint8)
    args = (
        *maps, low, high, mask, state[4:], state,
        frames, frames + height, height, width, frames - 1, height - 1, width - 1,
        tiles, found.tiles[1] * found.tiles[2], found.tiles[2], before, end, S,
        -(-before // KEYS), -(-before // KEYS) - (end - S) // KEYS, H // key.shape[1], tiles * H,
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
    )
    names = ("QT", "QH", "QW", "KT", "KH", "KW", "CT", "CH", "CW")
    settings = dict(
        zip(names, (*found.query, *found.key, *start), strict=True), BN=KEYS, **CONFIGS[BD],
        USE_MASK=key_mask is not None, CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24, num_warps=4,
        maxnreg=168)
    return args, settings, min(tiles * H, programs)


def _grid_map(
    role: str, x: Tensor, window: Window, before: int, sides: Any, BD: int
) -> Any:
    """A tensor map of the grid in x: [S, H, D], as (frames, height, width, H, D)."""
    _, height, width = window.grid
    S, H, D = x.stride()
    whole = x[before : before + window.tokens]
    return _descriptor(role, whole, (*window.grid, *x.shape[1:]),
                       (height * width * S, width * S, S, H, D), (*sides, 1, BD))


def _text_map(role: str, x: Tensor, BD: int) -> Any:
    """A tensor map of x: [S, H, D], whose box is a run of tokens."""
    rows = x.stride(0)
    return _descriptor("text " + role, x, (1, 1, *x.shape), (rows, rows, *x.stride()),
                       (1, 1, KEYS, 1, BD))


class _Made(threading.local):
    """Descriptors by role and shape, for one thread: their tensor changes at every call."""

    def __init__(self) -> None:
        self.descriptors: dict[Any, Any] = {}


_made = _Made()
DESCRIPTORS = 256


def _descriptor(role: str, x: Tensor, shape: tuple, strides: tuple, box: tuple) -> Any:
    """Making one checks a lot; one of the same role, shape and strides is taken again."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    known = _made.descriptors
    key = (role, shape, strides, box, x.dtype)
    if key not in known:
        if len(known) >= DESCRIPTORS:
            known.clear()
        known[key] = TensorDescriptor(x, list(shape), list(strides), list(box),
                                      _layout(box, x.dtype))
    found = known[key]
    found.base = x
    return found


@functools.lru_cache(maxsize=64)
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(box), element)
