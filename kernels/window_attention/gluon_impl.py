"""Window attention on Hopper GPUs through Gluon: TMA, wgmma and warp specialisation."""

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

from .geometry import Window, boxes, table
from .text import fill_text

ROWS, KEYS = 128, 128
# padded head dim -> K/V stages, Q buffers, exponentials by polynomial
CONFIGS = {
    64: {"ST": 4, "QST": 2, "POLYNOMIAL": True},
    128: {"ST": 2, "QST": 2, "POLYNOMIAL": False},
}


def not_supported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = hopper_reasons(query.device, query.dtype, query.shape[-1])
    for x in (query, key, value):
        if x.data_ptr() % 16 or any(n * x.element_size() % 16 for n in x.stride()[:3]):
            reasons.append("rows that do not start at multiples of 16 bytes")
            break
    return reasons or [reason for reason in (broken(query.device),) if reason]


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
    if not error < 0.01:
        return f"wrong result on this device, largest error {error:.3g}"
    return counters_left(device)


def run(
    query: Tensor, key: Tensor, value: Tensor, window: Window, *, before: int,
    key_mask: Tensor | None, scale: float,
) -> Tensor:
    """One launch a sample: a tensor map has five dimensions, all taken by grid, head and D."""
    B, S, H, D = query.shape
    output = torch.empty(B, S, H, D, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    fill_text(output, query, key, value, before=before, grid_tokens=window.tokens,
              key_mask=key_mask, scale=scale)
    flags = None
    if key_mask is not None:
        key_mask = key_mask.contiguous()
        # whether any key of the grid is masked: known on the device only
        flags = torch.zeros(B, 4, dtype=torch.int32, device=query.device)
        flags[:, 0] = (~key_mask[:, before : before + window.tokens]).any(1)
    for b in range(B):
        sample = (query[b], key[b], value[b], output[b])
        masks = None if key_mask is None or flags is None else (key_mask[b], flags[b])
        plan = plan_of(*sample, window, before=before, masked=masks is not None, scale=scale)
        plan.launch(*tensors(*sample, window, counter(query), before=before, masks=masks))
    return output


def tensors(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, window: Window, taken: Tensor, *,
    before: int, masks: tuple[Tensor, Tensor] | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the launch of one sample: what its tensor maps map, and what it takes by pointer.

    masks: bool [S] of the keys that count, and int32, not 0 where any key of the grid does not.
    """
    grid = (x[before:] if before else x for x in (query, key, value, output))
    low, high = table(window, query.device)
    mask, masked = (low, low) if masks is None else (masks[0].view(torch.uint8), masks[1])
    return (*grid, key, value), (low, high, mask, masked, taken)


def plan_of(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, window: Window, *, before: int,
    masked: bool, scale: float,
) -> Plan:
    """The plan of the launch of one sample, [S, H, D]."""
    known = ("window", query.shape, query.stride(), key.shape, key.stride(), value.stride(),
             query.dtype, query.get_device(), window, before, masked, scale)
    return planned(known, lambda: _plan(
        query, key, value, output, window, before=before, masked=masked, scale=scale))


def _plan(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, window: Window, *, before: int,
    masked: bool, scale: float,
) -> Plan:
    from .gluon_kernel import window_attention_hopper_kernel as kernel

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
    maps = [_grid_map(x, window, sides, BD) for x, sides in (
        (query, half), (key, found.key), (value, found.key), (output, half))]
    maps += [_text_map(x, BD) for x in (key, value)]
    numbers = (
        frames, frames + height, height, width, frames - 1, height - 1, width - 1,
        tiles, found.tiles[1] * found.tiles[2], found.tiles[2], before, end, S,
        -(-before // KEYS), -(-before // KEYS) - (end - S) // KEYS, H // key.shape[1], tiles * H,
        # the kernel's exponentials are powers of two
        scale * 1.4426950408889634,
    )
    names = ("QT", "QH", "QW", "KT", "KH", "KW", "CT", "CH", "CW")
    settings = dict(
        zip(names, (*found.query, *found.key, *start), strict=True), BN=KEYS, **CONFIGS[BD],
        USE_MASK=masked, CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24, num_warps=4, maxnreg=168)
    return Plan(kernel, tuple(maps), numbers, settings, tiles * H)


def _grid_map(x: Tensor, window: Window, sides: Any, BD: int) -> Any:
    """A tensor map of the grid in x: [S, H, D], as (frames, height, width, H, D)."""
    _, height, width = window.grid
    S, H, D = x.stride()
    return tensor_map(x, (*window.grid, *x.shape[1:]), (height * width * S, width * S, S, H, D),
                      (*sides, 1, BD))


def _text_map(x: Tensor, BD: int) -> Any:
    """A tensor map of x: [S, H, D], whose box is a run of tokens."""
    rows = x.stride(0)
    return tensor_map(x, (1, 1, *x.shape), (rows, rows, *x.stride()), (1, 1, KEYS, 1, BD))
