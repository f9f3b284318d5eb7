"""The order of rows by torch operations, a dozen of them; its results are the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def not_supported_reasons(counts: Tensor) -> list[str]:
    return []


def late_first(counts: Tensor, workers: int) -> Tensor:
    length = counts.double()
    left = (length.sum() - length.cumsum(0)) / workers
    late = length > left + length.mean()
    return torch.sort((~late).to(torch.uint8), stable=True).indices.to(torch.int32)
