"""Whether Triton kernels can run on a device: compiled on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch

__all__ = ["interpreting", "triton_reasons"]

CAPABILITY = (8, 0)


def triton_reasons(device: torch.device) -> list[str]:
    """Why Triton cannot run on `device`; nothing means that it can."""
    if not _installed():
        return ["triton is not installed"]
    if device.type == "cuda":
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < CAPABILITY:
            return [f"compute capability is below {CAPABILITY}"]
    elif device.type != "cpu" or not interpreting():
        return [f"device {device} is neither a GPU nor a CPU under TRITON_INTERPRET=1"]
    return []


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
