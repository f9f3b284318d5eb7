"""The dense attention kernels of this machine; each is a context in which dense calls use it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_TORCH = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
          "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}
FLASH_4 = "flash-attn-4"


def kernels(device: str) -> list[str]:
    """Names to try: torch's own choice first."""
    if device != "cuda":
        return ["default", "math"]
    found = ["default", "cudnn", "flash"]
    return [*found, FLASH_4] if _flash_4_installed() else found


@contextmanager
def dense_kernel(name: str) -> Iterator[None]:
    """Every dense attention call in here runs on this kernel where it can, else on torch's next.

    A padding mask that hides nothing is dropped, so that dense is not held back by it.
    """
    stock = F.scaled_dot_product_attention
    flash_4 = _flash_4() if name == FLASH_4 else None

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, **more: Any) -> Any:
        if attn_mask is not None and attn_mask.dtype == torch.bool and bool(attn_mask.all()):
            attn_mask = None
        if flash_4 is not None and attn_mask is None and not is_causal and not dropout_p:
            out = flash_4(*(x.transpose(1, 2) for x in (query, key, value)), softmax_scale=scale)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
        return stock(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                     is_causal=is_causal, scale=scale, **more)

    F.scaled_dot_product_attention = attend
    try:
        if name in _TORCH:
            order = [_TORCH[name], *(k for k in _TORCH.values() if k is not _TORCH[name])]
            with sdpa_kernel(order, set_priority=True):
                yield
        else:
            yield
    finally:
        F.scaled_dot_product_attention = stock


def dense_call(name: str, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """A call of dense attention on this kernel; all [B, S, H, D], the result [B, H, S, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))

    def run() -> Tensor:
        with dense_kernel(name):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _flash_4_installed() -> bool:
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def _flash_4() -> Callable[..., Any]:
    from importlib import import_module

    return import_module("flash_attn.cute").flash_attn_func
