"""What Gluon kernels on Hopper GPUs share: whether they run, and launches that cost little."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Plan", "counter", "counters_left", "hopper_reasons", "planned", "tensor_map"]

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 128)
PLANS = 256
COUNTERS = 4096


def hopper_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Why no kernel for Hopper can run; nothing means that it can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return [f"device {device} is not an NVIDIA GPU"]
    reasons = []
    if torch.cuda.get_device_capability(device)[0] != 9:
        reasons.append("not a Hopper GPU (compute capability 9)")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {DTYPES}")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1] or head_dim % 8:
        reasons.append(f"head_dim {head_dim} is not a multiple of 8 in {HEAD_DIMS}")
    return reasons


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass
class Plan:
    """All of a launch that does not change from call to call of the same shapes.

    maps: the kernel's first arguments, tensor maps; tensors are put into them at every call.
    numbers: its last ones; tensors stand between. work: items that the programs share.

    A kernel that was launched before is launched past triton's look at every argument, which costs
    more host time than the rest of a call. That look decides by what a plan stands for, and by
    whether pointers are multiples of 16 bytes.
    """

    kernel: Any
    # None for one that a setting switches off; those stand last
    maps: tuple[Any, ...]
    numbers: tuple[Any, ...]
    settings: dict[str, Any]
    work: int
    _ready: Any = None

    def __post_init__(self) -> None:
        self._constants = tuple(self.settings[name] for name in self.kernel.arg_names
                                if name in self.settings)

    def arguments(self, mapped: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The kernel's arguments, less its compile-time settings. mapped: tensors of `maps`."""
        for made, x in zip(self.maps, mapped, strict=False):
            made.base = x
        return (*self.maps, *tensors, *self.numbers)

    def launch(self, mapped: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> None:
        """On the device of the tensors; triton launches on the current one."""
        device = tensors[0].get_device()
        if device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.launch(mapped, tensors)
            return
        args = self.arguments(mapped, tensors)
        pointers = 0
        for x in tensors:
            pointers |= x.data_ptr()
        if self._ready is not None and pointers % 16 == 0:
            self._ready(*args, *self._constants)
        else:
            grid = (min(self.work, _multiprocessors(tensors[0].device)), 1, 1)
            found = self.kernel[grid](*args, **self.settings)
            if pointers % 16 == 0:
                self._ready = found[grid]
        for made in self.maps[: len(mapped)]:
            made.base = None


class _Made(threading.local):
    """Plans by kernel and shapes, for one thread: tensors are put into them at every call."""

    def __init__(self) -> None:
        self.plans: dict[tuple, Plan] = {}


_made = _Made()


def planned(known: tuple, make: Callable[[], Plan]) -> Plan:
    """The plan that `known` stands for, made once."""
    plan = _made.plans.get(known)
    if plan is None:
        if len(_made.plans) >= PLANS:
            _made.plans.clear()
        plan = _made.plans[known] = make()
    return plan


def counter(x: Tensor) -> Tensor:
    """A zero on the device of `x`, int32 [4], for a kernel that leaves it zero.

    Thousands are handed out in turn, so that none is used twice at a time, on whatever streams.
    """
    if torch.cuda.is_current_stream_capturing():
        # a graph keeps what it was given, and may run beside anything
        return torch.zeros(4, dtype=torch.int32, device=x.device)
    return next(_counters(x.get_device()))


def counters_left(device: torch.device) -> str | None:
    """What is wrong when a kernel did not leave its counter at zero; waits for the device."""
    torch.cuda.synchronize(device)
    dirty = bool(_zeros(torch.empty(0, device=device).get_device()).any())
    return "a counter of work was not left at zero" if dirty else None


@functools.cache
def _zeros(device: int) -> Tensor:
    # as far apart as pointers of kernels are aligned
    zeros = torch.zeros(COUNTERS, 4, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.current_stream(device).synchronize()
    return zeros


@functools.cache
def _counters(device: int) -> Iterator[Tensor]:
    return itertools.cycle(_zeros(device).unbind(0))


def tensor_map(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple) -> Any:
    """A tensor map of x's memory, taken as `shape` with `strides`, that fetches `box`."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(x, list(shape), list(strides), list(box), _layout(box, x.dtype))


@functools.lru_cache(maxsize=64)
def _layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(box), element)
