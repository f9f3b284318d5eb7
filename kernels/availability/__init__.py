"""Whether Triton kernels can run on a device: compiled on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch

__all__ = ["interpreting", "triton_reasons"]

CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 256)


def triton_reasons(
    device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> list[str]:
    """Why no Triton kernel of ours can run; nothing means that it can.

    dtype, head_dim: None for a kernel that takes any.
    """
    if not _installed():
        return ["triton is not installed"]
    reasons = []
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
            reasons.append(f"compute capability is below {CAPABILITY}")
    elif device.type != "cpu" or not interpreting():
        reasons.append(f"device {device} is neither a GPU nor a CPU under TRITON_INTERPRET=1")
    if dtype is not None and dtype not in DTYPES:
        reasons.append(f"dtype {dtype} is not one of {DTYPES}")
    if head_dim is not None and not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        reasons.append(f"head_dim {head_dim} is outside {HEAD_DIMS}")
    return reasons


@functools.cache
def _installed() -> bool:
    # asked at every call, and a look through the import path costs more than a launch
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether triton runs kernels as Python."""
    # asking the environment first spares a plain CPU the import of triton
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0") and _interprets()


@functools.cache
def _interprets() -> bool:
    import triton

    @triton.jit
    def nothing():
        pass

    # decided when triton was first imported, whatever the variable says now
    return type(nothing).__name__ == "InterpretedFunction"
