"""The order in which uneven rows are begun, by a model of a GPU that takes row after row."""

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.kernels.block_sparse_attention import late_first


def ends(lengths: torch.Tensor, workers: int) -> float:
    """When the last row ends: whoever is done takes the next."""
    free = [0.0] * workers
    for length in lengths.tolist():
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def lognormal(heads: int, blocks: int, mean: float, seed: int) -> torch.Tensor:
    rows = torch.randn(heads, blocks, generator=torch.Generator().manual_seed(seed)).exp()
    return (rows * mean / rows.mean()).round().clamp(1, blocks).int()


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 9))
def test_every_row_once_and_the_rest_in_place(counts, workers):
    lengths = torch.tensor(counts, dtype=torch.int32)
    order = late_first(lengths, workers)
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(len(counts)))
    left = [sum(counts[i + 1:]) / workers for i in range(len(counts))]
    mean = sum(counts) / max(1, len(counts))
    late = [i for i, n in enumerate(counts) if n > left[i] + mean]
    assert order.tolist() == late + [i for i in range(len(counts)) if i not in late]


def test_even_rows_stay_as_they_are():
    for rows in (1, 100, 3000):
        assert torch.equal(late_first(torch.full((rows,), 32), 132), torch.arange(rows).int())


@pytest.mark.parametrize("seed", range(4))
def test_uneven_rows_end_together(seed):
    counts = lognormal(12, 256, 32, seed)
    order = late_first(counts, 132)
    least = counts.sum() / 132
    assert ends(counts.flatten(), 132) > 1.15 * least
    assert ends(counts.flatten()[order.long()], 132) < 1.08 * least
    # few leave their place beside the other rows of their head
    moved = int((order.diff() < 0).nonzero()[0]) + 1
    assert moved < 0.03 * counts.numel()


@pytest.mark.parametrize("heads, blocks, text, kept, before, after", [
    (24, 132, 4, 20, 1.15, 1.03), (24, 76, 4, 19, 1.15, 1.03), (24, 36, 4, 9, 1.2, 1.15)])
def test_text_rows_that_keep_everything(heads, blocks, text, kept, before, after):
    """Flux at 2048, 1536 and 1024 pixels: the rows of the last head's text are as long as all that
    is left when they are begun."""
    counts = torch.full((heads, blocks), kept)
    counts[:, :text] = blocks
    order = late_first(counts, 132).long()
    least = counts.sum() / 132
    assert ends(counts.flatten(), 132) > before * least
    assert ends(counts.flatten()[order], 132) < after * least
