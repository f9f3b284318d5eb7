"""What launches of plain Triton kernels share: strides in units, and what fits a card."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["large", "shared_memory", "strides_in_units"]

# bytes of shared memory of a block on which the tiles chosen for Hopper count
LARGE = 200 << 10


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
