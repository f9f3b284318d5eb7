"""In which order rows of uneven length are begun, so that none is begun too late."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastdiff.kernels.availability import choose

__all__ = ["late_first"]

IMPLEMENTATIONS = {"triton": ".triton_impl", "torch": ".torch_impl"}
AUTO = ("triton", "torch")


def late_first(counts: Tensor, workers: int, *, impl: str = "auto") -> Tensor:
    """Row numbers, int32 [rows]: rows that would end after all others come first, the rest as is.

    counts: integers of any shape, the blocks that each row keeps, in the order in which rows are
        begun otherwise. workers: rows that run at a time, a GPU's multiprocessors.

    A row is late where its own length exceeds what is left for each worker when it is begun, by a
    mean row or more. Rows are begun head by head, so that the keys of a head stay in cache; longest
    first would mix all heads, while so few rows are late that the others keep their place. Nothing
    is read on the host.
    """
    if counts.is_floating_point() or counts.dtype == torch.bool:
        raise ValueError(f"counts must be integers, got {counts.dtype}")
    if workers < 1:
        raise ValueError(f"workers must be positive, got {workers}")
    module = _module(choose(
        impl, counts.device, IMPLEMENTATIONS, AUTO,
        lambda name: _module(name).not_supported_reasons(counts),
        f"late_first on {counts.device}"))
    return module.late_first(counts.reshape(-1), workers)


@cache
def _module(name: str) -> ModuleType:
    return import_module(IMPLEMENTATIONS[name], __name__)
