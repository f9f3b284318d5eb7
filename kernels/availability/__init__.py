"""Which implementation runs a call, and whether Triton kernels can: compiled, or interpreted."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec

import torch

__all__ = ["choose", "interpreting", "triton_reasons"]

CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 256)

logger = logging.getLogger("fastdiff")


def choose(
    impl: str, device: torch.device, known: Iterable[str], auto: tuple[str, ...],
    reasons: Callable[[str], list[str]], call: str,
) -> str:
    """The implementation that runs a call: `impl`, or for "auto" the first of `auto` that can.

    known: all names. reasons: why a named one cannot run the call. call: what was asked, in words.
    Raises ValueError, with every reason, where none can run it. A name is taken at its word. Where
    torch operations do on a GPU what a kernel of ours was for, the log says why, once.
    """
    if impl != "auto" and impl not in known:
        raise ValueError(f"impl must be 'auto' or one of {list(known)}, got {impl!r}")
    refused: dict[str, list[str]] = {}
    for name in auto if impl == "auto" else (impl,):
        # an interpreted kernel on the CPU is for tests, so only its own name selects it
        if impl == "auto" and name != "torch" and device.type == "cpu":
            continue
        refused[name] = reasons(name)
        if not refused[name]:
            slow = name == "torch" and len(refused) > 1 and device.type == "cuda"
            if slow and not torch.compiler.is_compiling():
                _warn(f"torch operations run {call}, which takes longer ({_words(refused)})")
            return name
    raise ValueError(f"no implementation for {call} ({_words(refused)})")


def _words(refused: dict[str, list[str]]) -> str:
    return "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items() if why)


@functools.lru_cache(maxsize=256)
def _warn(told: str) -> None:
    logger.warning("%s", told)


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
