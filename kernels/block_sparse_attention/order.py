"""In which order rows of uneven length are begun, so that none is begun too late."""

from __future__ import annotations

import torch
from torch import Tensor


def late_first(counts: Tensor, workers: int, slack: float = 1.0) -> Tensor:
    """Row numbers, int32 [rows]: rows that would end after all others come first, the rest as is.

    counts: blocks that each row keeps, any shape, in the order in which rows are begun otherwise.
    workers: rows that run at a time, a GPU's multiprocessors. slack: by how many mean rows the end
        may be late.

    A row is late where its own length exceeds what is left for each worker when it is begun. Rows
    are begun head by head, so that the keys of a head stay in cache; longest first would mix all
    heads, while so few rows are late that the others keep their place. Nothing is read on the host.
    """
    length = counts.flatten().double()
    left = (length.sum() - length.cumsum(0)) / workers
    late = length > left + slack * length.mean()
    return torch.sort((~late).to(torch.uint8), stable=True).indices.to(torch.int32)
