"""The order in which uneven rows are begun, by a model of a GPU that takes row after row."""

import heapq
import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton_process import run_apart

from fastdiff.kernels.row_order import late_first


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


def test_refusals():
    with pytest.raises(ValueError, match="counts must be integers, got torch.float32"):
        late_first(torch.ones(3), 2)
    with pytest.raises(ValueError, match="workers must be positive, got 0"):
        late_first(torch.ones(3).int(), 0)
    with pytest.raises(ValueError, match="impl must be"):
        late_first(torch.ones(3).int(), 2, impl="fast")


TRITON = """
import torch
from fastdiff.kernels.row_order import late_first, triton_impl
device = "cuda" if torch.cuda.is_available() else "cpu"
g = torch.Generator().manual_seed(0)
late = 0
for together in (triton_impl.ROWS, 128):
    # so that a few rows take several turns too
    triton_impl.ROWS = together
    for rows in (0, 1, 127, 129, 1500, *((3072, 20000) if device == "cuda" else ())):
        for spread in (0.0, 0.8, 2.0):
            counts = (torch.randn(rows, generator=g) * spread).exp() * 30
            # the largest numbers that can be: every sum stays exact
            for scale in (1, 100_000):
                uneven = (counts * scale).long().clamp(max=2**31 - 1).int().to(device)
                for workers in (1, 132):
                    wanted = late_first(uneven, workers, impl="torch")
                    found = late_first(uneven, workers, impl="triton")
                    assert torch.equal(found, wanted), (rows, spread, scale, workers)
                    late += (wanted.cpu() != torch.arange(rows)).sum().item()
assert late > 500
wide = torch.arange(60, dtype=torch.int32, device=device).view(2, 5, 6).mT
assert torch.equal(late_first(wide, 3, impl="triton"), late_first(wide, 3, impl="torch"))
assert (late_first(torch.zeros(9).int().to(device), 3, impl="triton").cpu()
        == torch.arange(9)).all()
print("all right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton():
    """Interpreted in a process of its own, or compiled where a GPU is."""
    done = run_apart(TRITON)
    assert done.returncode == 0 and "all right" in done.stdout, done.stderr[-3000:]
