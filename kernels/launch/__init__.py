"""What launches of plain Triton kernels share: a short way, strides in units, what fits a card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["large", "launch", "shared_memory", "strides_in_units"]

# bytes of shared memory of a block on which the tiles chosen for Hopper count
LARGE = 200 << 10

READY = 4096
# programs that a launch may have along its second and third axis
MOST = 65_535
# launches by all that decides which compiled kernel they take
_ready: dict[tuple, tuple[Callable[..., None], tuple]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **settings: Any) -> None:
    """kernel[grid](*args, **settings) on the device of the first argument, a tensor; past triton's
    look at every argument where it looked before.

    Triton launches on the current device, wherever the tensors are. Its look takes more of the
    host's time than the rest of a launch. It decides by the dtypes and alignment of tensors and by
    what kinds of numbers there are; here a call is known by its dtypes and all of its numbers, and
    takes the short way only where every pointer is a multiple of 16.
    settings: the kernel's last parameters, those of compile time, and options of the compiler.
    Raises ValueError for more programs along the later axes, samples times heads mostly, than a GPU
    takes.
    """
    if not args[0].is_cuda or torch.compiler.is_compiling():
        kernel[grid](*args, **settings)
        return
    device = args[0].get_device()
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **settings)
        return
    pointers, known = 0, [id(kernel), grid, device, *settings.values()]
    for x in args:
        if isinstance(x, Tensor):
            pointers |= x.data_ptr()
            known.append(x.dtype)
        else:
            known.append(x)
    key = tuple(known)
    if pointers % 16 == 0 and (found := _ready.get(key)) is not None:
        run, constants = found
        run(*args, *constants)
        return
    if max(grid[1:], default=0) > MOST:
        raise ValueError(f"{max(grid[1:]):,} programs along the second axis, samples times heads: "
                         f"a GPU takes at most {MOST:,}; split the batch")
    compiled = kernel[grid](*args, **settings)
    # what an interpreter or a hook returns is no kernel
    if pointers % 16 == 0 and hasattr(compiled, "__getitem__"):
        if len(_ready) >= READY:
            _ready.clear()
        constants = tuple(settings[name] for name in kernel.arg_names[len(args):])
        _ready[key] = compiled[(*grid, 1, 1)[:3]], constants


def strides_in_units(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of all tensors, each tensor's last one left out, in units; and the unit, 8 or 1.

    A kernel multiplies strides by the unit, a compile-time number: so the compiler sees that rows
    of 40 or 72 elements are aligned. It multiplies in the 32 bits that a stride comes in, so one
    that needs more comes whole, in 64.
    """
    strides = [stride for x in tensors for stride in x.stride()[:-1]]
    unit = 8 if all(stride % 8 == 0 and stride < 1 << 31 for stride in strides) else 1
    return [stride // unit for stride in strides], unit


def large(device: torch.device) -> bool:
    """Whether a block may have as much shared memory as on Hopper."""
    return shared_memory(device) >= LARGE


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; an interpreter has all it wants."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    # not told of every kind of GPU
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
